"""The one equation, evaluated.

    L = sum_j lambda_j sum_t scale[t] omega_j[t] f_j(stats[t])  +  sum_k lambda_k a_k

``f_j`` is a per-token term, a differentiable function of a token's statistics; ``omega_j``
a detached weight, any function of the batch's statistics; ``scale`` the token's share of
the one denominator; ``a_k`` scalars of other tensors. Objectives, modifiers and components
are ways to fill it in.
"""
