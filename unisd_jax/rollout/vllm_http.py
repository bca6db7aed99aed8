"""One vLLM server over HTTP: what is said on the wire, and a check of everything that comes back."""

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import requests

from unisd_jax.errors import UserError
from unisd_jax.rollout.protocol import RolloutFailed, Sampling, StaleWeights

CONNECT_SECONDS = 5.0
QUICK_SECONDS = 2.0
# What vLLM writes where a log-prob is -inf or NaN, which JSON cannot say.
NO_LOGP = -9999.0
GENERATE = "/inference/v1/generate"
START = "start one with `python -m unisd_jax.rollout.vllm_server --config ...`"


class Lost(Exception):
    """The server cannot be reached, broke off, failed or aborted: the same request may be sent again."""


class LoadFailed(Exception):
    """The server did not take new weights; what it holds now is unknown."""


class Refused(UserError):
    """The server understood a request and said no."""


class Completion(NamedTuple):
    """One sampled completion, its log-probs as in `Rollout`, and the label of the weights that made it."""

    ids: list[int]
    logps: list[float]
    stopped: bool
    label: str


class Server:
    """A vLLM server at `address`; its methods may be called from several threads at once.

    Every method but `healthy` and `check` raises Lost, and Refused where the server said no.
    """

    def __init__(self, address: str, *, timeout: float):
        self.address = address.rstrip("/")
        self.timeout = timeout
        self._local = threading.local()

    def healthy(self) -> bool:
        """Whether the server answers and its engine works."""
        try:
            return self._send("GET", "/health", seconds=QUICK_SECONDS).ok
        except Lost:
            return False

    def check(self, *, may_resume: Callable[[str], bool] = lambda label: False) -> None:
        """The first contact: forced completions come back exactly, with log-probs that follow the temperature.

        A server that a trainer left paused, killed in the middle of a load, goes on if `may_resume` says so of its
        label.

        Raises:
          RolloutFailed: it is left paused and may not go on.
          UserError: no server, another kind of server, or one that was started differently.
        """
        try:
            self._get("/health")
            self._get("/version")
            label = self.label()
            if self._field(self._get("/is_paused"), "is_paused", bool):
                if not may_resume(label):
                    raise RolloutFailed(of_another_run(self.address, label))
                self._post("/resume")
            logps = []
            for temperature in (0.5, 1.0):
                (completion,) = self.complete([0], Sampling(2, (), 0, temperature=temperature), seed=0, forced=[1, 0])
                logps.append(completion.logps)
            if logps[0] == logps[1]:
                raise UserError(f"{self.address} reports log-probs before the temperature")
        except RolloutFailed:
            raise
        except (Lost, UserError) as error:
            raise UserError(f"rollout.vllm: {error}; {START}") from None

    def label(self) -> str:
        """The label of the weights that the server holds; "default" after its start."""
        return self._field(self._get("/weight_info"), "weight_version", str)

    def complete(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
        n: int = 1,
        model: str = "student",
        forced: Sequence[int] | None = None,
    ) -> list[Completion]:
        """`n` completions of one prompt; `forced` are the tokens to say instead of sampled ones.

        Completion i is drawn from `seed` + i, of which a server uses the low 32 bits: seeds of one prompt are to lie at
        least `n` apart. With `forced` nothing is truncated and no token stops.

        Raises:
          StaleWeights: one completion was made by several versions of the weights.
          UserError: the reply is not what was asked for.
        """
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; a server tells only those below 2**32 apart")
        if forced is not None:
            sampling = Sampling(len(forced), (), sampling.pad_id, sampling.temperature)
        # vLLM refuses several greedy completions.
        asked = 1 if sampling.temperature == 0 else n
        reply = self._post(GENERATE, _request(prompt, sampling, seed, asked, model, forced))
        choices = self._field(reply, "choices", list)
        if len(choices) != asked:
            raise UserError(f"{self.address}: {len(choices)} completions came back; expected {asked}")
        try:
            completions = [_completion(choice, sampling, forced) for _ in range(n // asked) for choice in choices]
        except (Lost, UserError) as error:
            raise type(error)(f"{self.address}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.address}: {GENERATE} answers unlike vLLM 0.32 ({error!r})") from None
        return completions

    def load_weights(self, folder: str, label: str) -> None:
        """Makes the safetensors in `folder` the server's weights, once running requests have ended.

        Raises:
          LoadFailed: they were not taken.
        """
        with self._paused():
            body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            self._load("/collective_rpc", body)
            self._forget_and_label(label)

    def load_adapter(self, folder: str, name: str, label: str, previous: str | None) -> None:
        """Offers the adapter in `folder` as the model `name`, and no longer the one called `previous`.

        Raises:
          LoadFailed: it was not taken.
        """
        with self._paused():
            # The name may be there when this is sent a second time. Loaded in place, vLLM 0.32 would read the files
            # again at every step of every request.
            self._unload_adapter(name)
            self._load("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
            if previous not in (None, name):
                self._unload_adapter(previous)
            self._forget_and_label(label)

    def _unload_adapter(self, name: str) -> None:
        response = self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if response.status_code != 404:  # a server that was started again knows none
            self._accepted(response)

    def set_label(self, label: str) -> None:
        """Names the weights that the server holds.

        Raises:
          StaleWeights: the server says another name afterwards, so that someone else sets it too.
        """
        self._post("/update_weight_version", {"new_version": label})
        found = self.label()
        if found != label:
            raise StaleWeights(f"{self.address} holds {found} right after {label} was loaded: another run uses it too")

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        try:
            self._post("/pause?mode=wait")
            yield
        except BaseException:
            # It must not stay paused; but what went wrong before matters more than what goes wrong here.
            with contextlib.suppress(Lost, Refused):
                self._accepted(self._send("POST", "/resume", seconds=QUICK_SECONDS))
            raise
        self._post("/resume")

    def _load(self, path: str, body: dict[str, Any]) -> None:
        response = self._send("POST", path, body)
        if not response.ok:
            raise LoadFailed(f"{self.address}{path}: {_reason(response)}")

    def _forget_and_label(self, label: str) -> None:
        if not self._field(self._post("/reset_prefix_cache"), "success", bool):
            raise LoadFailed(f"{self.address}: the prefix cache of the old weights could not be emptied")
        self.set_label(label)

    def _get(self, path: str) -> Any:
        return self._accepted(self._send("GET", path))

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._accepted(self._send("POST", path, body))

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float | None = None
    ) -> requests.Response:
        """Whatever the server answers.

        Raises:
          Lost: it does not.
        """
        seconds = seconds or self.timeout
        try:
            response = self._session().request(
                method, self.address + path, json=body, timeout=(min(CONNECT_SECONDS, seconds), seconds)
            )
        except requests.ReadTimeout:
            raise Lost(f"{self.address}{path}: no answer within {seconds:g} s (rollout.vllm.request_timeout)") from None
        except requests.RequestException as error:
            raise Lost(f"{self.address}{path}: the connection failed ({_root(error)})") from None
        if response.status_code >= 500:
            # The server ends the connection as well; what is sent before that is noticed is never read.
            self._session().close()
        return response

    def _accepted(self, response: requests.Response) -> Any:
        """The JSON of a good answer, None where there is none."""
        path = response.url.removeprefix(self.address)
        if response.status_code >= 500:
            raise Lost(f"{self.address}{path}: {_reason(response)}")
        if not response.ok:
            raise Refused(f"{self.address}{path}: {_reason(response)}{_advice(response)}")
        try:
            return json.loads(response.content)
        except ValueError:
            return None

    def _field(self, reply: Any, name: str, kind: type) -> Any:
        found = reply.get(name) if isinstance(reply, dict) else None
        if not isinstance(found, kind):
            raise UserError(f"{self.address}: a reply has no {name!r}; expected what vLLM 0.32 answers")
        return found

    def _session(self) -> requests.Session:
        """This thread's own: they keep their connections and are not made for sharing."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False  # servers are reached directly, not through a proxy
        return self._local.session


def of_another_run(address: str, label: str) -> str:
    """The message for a server that holds weights which someone else has sent."""
    return (
        f"{address} serves the weights of another run, {label}: give this one a server of its own, or set "
        "rollout.vllm.take_over=true if that run has ended"
    )


def _request(
    prompt: Sequence[int], sampling: Sampling, seed: int, n: int, model: str, forced: Sequence[int] | None
) -> dict[str, Any]:
    """The body of a generate request; what our plug-in does with `unisd` is written there."""
    own = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "vocab_size": sampling.vocab_size or 0,
    }
    if forced is not None:
        own["forced"] = [int(token) for token in forced]
    settings = {
        "max_tokens": sampling.max_completion_length,
        "temperature": 0.0 if sampling.temperature == 0 else 1.0,
        "n": n,
        "seed": seed,
        "logprobs": 0,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,
        "detokenize": False,
        "extra_args": {"unisd": own},
    }
    return {"model": model, "token_ids": [int(token) for token in prompt], "sampling_params": settings}


def _completion(choice: dict[str, Any], sampling: Sampling, forced: Sequence[int] | None) -> Completion:
    """A choice of the reply, if it is what was asked for.

    Raises:
      Lost, StaleWeights, UserError: it is not.
    """
    ids, reason, limit = choice["token_ids"], choice["finish_reason"], sampling.max_completion_length
    if reason not in ("stop", "length"):
        raise Lost(f"a completion was given up by the server (finish_reason {reason!r})")
    if reason == "length" and len(ids) < limit:
        raise UserError(
            f"a completion was cut after {len(ids)} of {limit} tokens, for prompt and completion are longer than the "
            f"server takes: raise rollout.vllm.max_length"
        )
    content = choice["logprobs"]["content"]
    if not 0 < len(ids) <= limit or [entry["token_id"] for entry in content] != ids:
        raise UserError(f"{len(ids)} tokens came with log-probs of {len(content)}; expected as many, up to {limit}")
    logps = [entry["logprob"] for entry in content]
    if not all(math.isfinite(logp) and logp > NO_LOGP for logp in logps):
        # Keys and values that are NaN stay in the server's memory and spoil later requests.
        raise UserError("a log-prob is not finite: the server's weights are or were unusable (NaN?); restart it")
    # A little more than 0 can be rounding; logits are far more.
    if max(logps) > 0.01:
        raise UserError(f"{max(logps):.4g} came as a log-prob: the server runs without the plug-in unisd_sampling")
    if forced is not None and ids != list(forced):
        raise UserError("other tokens came back than it was made to say: the server runs without unisd_sampling")
    if sampling.vocab_size and max(ids) >= sampling.vocab_size:
        raise UserError(f"token {max(ids)} came back; expected less than {sampling.vocab_size}")
    stops = [token in sampling.stop_ids for token in ids]
    if any(stops[:-1]) or stops[-1] != (reason == "stop"):
        raise UserError(
            f"finish_reason {reason!r} does not fit a completion that ends in {ids[-1]}, stop tokens inside"
        )
    versions = {entry["version"] for entry in choice["weight_versions"]}
    if len(versions) != 1:
        raise StaleWeights(f"a completion was made by several versions of the weights: {sorted(versions)}")
    return Completion(list(ids), logps, stops[-1], versions.pop())


def _reason(response: requests.Response) -> str:
    """What the server says went wrong, on one line."""
    try:
        body = json.loads(response.content)
        found = body.get("error", body.get("detail"))
        text = found["message"] if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError, KeyError):
        text = response.text
    return f"{response.status_code} {' '.join(text.split())[:400]}".strip()


def _advice(response: requests.Response) -> str:
    if "maximum model length" in response.text:
        return "; raise rollout.vllm.max_length or lower data.max_prompt_length"
    return ""


def _root(error: BaseException) -> str:
    """The name of what an error comes from, which the library wraps several times."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__
