"""The statistics of a token's distribution, by name, and the raw ones that they are made of."""
