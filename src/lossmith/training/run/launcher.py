"""What ``accelerate launch`` asks for through the environment, and a run of ours does not do."""

import os

from lossmith.training.errors import UserError

# Variables that are "true" where an engine is asked for, and what it is called.
OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def require_data_parallel(compiles: bool) -> None:
    """Raise UserError if another engine is asked for than DistributedDataParallel, or a compiler that the
    configuration does not know of."""
    for variable, engine in OTHER_ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(
                f"accelerate launch asks for {engine}, but this trainer gives every process the whole model "
                "(DistributedDataParallel). Leave it out of the command and of accelerate's configuration; "
                "for a model that needs it, write a script with LossTrainer (docs/huggingface.md)."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not compiles:
        raise UserError(
            f"accelerate launch asks for torch.compile ({backend}), but compile=False. Leave its "
            "--dynamo_backend out, or pass --compile."
        )
