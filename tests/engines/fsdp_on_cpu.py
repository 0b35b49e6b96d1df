"""Hugging Face's Trainer under FSDP with ranks on the CPU, where accelerate uses it on GPUs alone."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import _init_utils, _state_dict_utils


def fsdp_on_cpu(trainer_class: type, **of_plugin: Any) -> type:
    """A Trainer that uses FSDP as accelerate does. The settings of FSDP1 are the Trainer's own, but that the
    first rank does not send its weights to the others, which have the same."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    given = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT", **of_plugin}
    if given["fsdp_version"] == 1:
        given = {"use_orig_params": True, "reshard_after_forward": "FULL_SHARD", **given}
        let_fsdp1_use_the_cpu()
    mixed_precision = given.pop("mixed_precision", None)

    class OnCPU(trainer_class):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            plugin = FullyShardedDataParallelPlugin(**given)
            if mixed_precision is not None:
                plugin.set_mixed_precision(mixed_precision)
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    return OnCPU


def let_fsdp1_use_the_cpu() -> None:
    """It takes a CPU that it is told of for another one than the weights'; weights that it saves it copies to
    the CPU and frees, though they are there already."""
    _init_utils._get_device_from_device_id = lambda *_: None
    enter = _state_dict_utils._enter_unshard_params_ctx
    if enter.__name__ != "enter_on_cpu":

        def enter_on_cpu(*args: Any, **options: Any) -> None:
            enter(*args, **{**options, "offload_to_cpu": False})

        _state_dict_utils._enter_unshard_params_ctx = enter_on_cpu
