"""The engine that a configuration asks for."""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from unisd_jax.config import Config
from unisd_jax.errors import ConfigError
from unisd_jax.models import Model
from unisd_jax.parallel import multihost
from unisd_jax.rollout.folders import sync_folder
from unisd_jax.rollout.jax_sampler import JaxSampler
from unisd_jax.rollout.lanes import Lane
from unisd_jax.rollout.probe import bound, make_probe
from unisd_jax.rollout.protocol import RolloutEngine
from unisd_jax.rollout.vllm_client import VllmEngine
from unisd_jax.rollout.vllm_command import adapter_rank
from unisd_jax.rollout.vllm_server import OwnServer, start_server
from unisd_jax.rollout.weights import Publisher, needed_bytes

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


def make_engine(
    config: Config, model: Model, checkpoint: Path, sequences: Sequences, *, pad_id: int, folder: Path, training: bool
) -> RolloutEngine:
    """The sampler in this process, or vLLM's servers: no server is started before weights are published.

    Args:
      config: of the run.
      model: the network that samples.
      checkpoint: the folder of its first weights.
      sequences: prompts with completions, of which the first are scored on both sides after every load.
      pad_id: what fills their rows.
      folder: where logs go, and published weights if shared memory is too small.
      training: whether a run trains; an evaluation beside it is another user of a server.

    Raises:
      ConfigError: addresses that cannot be shared out, servers elsewhere and no folder shared with them, or one port
        for several servers.
    """
    if config.rollout.engine == "jax":
        return JaxSampler(model)
    options, (number, count) = config.rollout.vllm, multihost.own_share()
    folder = folder if training else folder / "evaluation"
    addresses = own_addresses(options.addresses, number, count)
    if options.sync_dir is None and not all(is_here(address) for address in addresses):
        raise ConfigError(
            f"rollout.vllm.addresses: {', '.join(addresses)} may be another machine, which does not see this one's "
            "memory; set rollout.vllm.sync_dir to a folder that both share"
        )
    together = multihost.processes_here()
    if not addresses and together > 1 and (options.port is not None or options.devices is not None):
        raise ConfigError(
            f"rollout.vllm.port and rollout.vllm.devices are for one server, but {together} processes of this machine "
            "each start one: start servers by hand and name them as rollout.vllm.addresses"
        )
    dtype = config.model.dtype if options.dtype == "model" else options.dtype
    # Processes may share a folder, and each writes its own files.
    owner = owner_of(config) + ("" if training else "-evaluation") + (f"-{number}" if count > 1 else "")
    adapter_only = options.sync == "adapter"
    needed = (3 if adapter_only else 2) * needed_bytes(model, dtype)
    place = sync_folder(options.sync_dir, folder, needed=needed, owner=owner, processes=together)
    publisher = Publisher(place, model, owner=owner, dtype=dtype, base=config.model.path)
    say = functools.partial(print, flush=True)

    def start() -> OwnServer:
        log = folder / ("vllm.log" if number == 0 else f"vllm-{number}.log")
        rank = adapter_rank(config) if adapter_only else None
        return start_server(config, checkpoint, log, lora_rank=rank, say=say)

    lane = functools.partial(Lane, options, owner=owner, say=say)
    return VllmEngine(
        model, publisher=publisher, adapter_only=adapter_only,
        lanes=[lane(address=address) for address in addresses] or [lane(start=start)],
        probe=make_probe(sequences, pad_id=pad_id), bound=bound(options.max_probe_gap, dtype),
        max_sequences=options.max_sequences,
    )  # fmt: skip


def owner_of(config: Config) -> str:
    """A name for a run that its resumed self has too, and no other run."""
    place = hashlib.sha256(str((Path(config.output_dir) / config.name).absolute()).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', config.name)[:40]}-{place}"


def own_addresses(addresses: Sequence[str], process: int, processes: int) -> list[str]:
    """This process' share of the servers.

    Raises:
      ConfigError: they cannot be shared out evenly.
    """
    if len(addresses) % processes:
        raise ConfigError(
            f"rollout.vllm.addresses names {len(addresses)} servers for {processes} processes; expected a multiple"
        )
    share = len(addresses) // processes
    return list(addresses[process * share : (process + 1) * share])


def is_here(address: str) -> bool:
    """Whether an address can only be this machine."""
    return re.fullmatch(r"https?://(127\.0\.0\.1|localhost):\d+", address) is not None
