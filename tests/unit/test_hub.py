"""Names of checkpoints: directories as they are, hub ids as downloads, and one line for everything else."""

import errno
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from unisd_jax.errors import UserError
from unisd_jax.models import local_checkpoint


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that records what it is asked for and answers with a directory, or with the error it is given."""

    class Hub:
        calls = []
        error = None

        def download(self, repository, **options):
            self.calls.append((repository, options))
            if self.error is not None:
                raise self.error
            return str(tmp_path / "cache")

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def refused(name):
    with pytest.raises(UserError) as error:
        local_checkpoint(name)
    message = str(error.value)
    assert message.startswith(f"model.path: {name} is not a directory") and "\n" not in message
    return message


def test_a_directory_is_taken_as_it_is(hub, tmp_path, monkeypatch):
    assert local_checkpoint(str(tmp_path)) == tmp_path
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(local_checkpoint("models/mine")) == "models/mine", "a directory comes before the hub"
    assert hub.calls == []


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", None),
        ("google/gemma-3-1b-it@main", "google/gemma-3-1b-it", "main"),
        ("a_b/c.d@refs/pr/3", "a_b/c.d", "refs/pr/3"),
    ],
)
def test_a_hub_id_is_downloaded(hub, tmp_path, name, repository, revision):
    assert local_checkpoint(name) == tmp_path / "cache"
    [(asked, options)] = hub.calls
    assert asked == repository and options["revision"] == revision
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    others = ["pytorch_model.bin", "model.gguf", "consolidated.safetensors", "original/params.json", "onnx/model.onnx"]
    patterns = dict(allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"])
    assert list(huggingface_hub.utils.filter_repo_objects(files + others, **patterns)) == files


@pytest.mark.parametrize("name", ["smollm2", "a/b/c", "/absolute/path", "../up", "a/b@", "a b/c"])
def test_what_is_neither(hub, name):
    assert "nor a Hugging Face Hub id such as" in refused(name)
    assert hub.calls == []


def test_a_file(hub, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").write_text("")
    monkeypatch.chdir(tmp_path)
    refused("models/weights")
    assert hub.calls == []


def refusal(kind, status):
    """One of the hub's errors, with as much of a response as they look at."""
    return kind(str(status), response=types.SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (refusal(errors.GatedRepoError, 403), "accept its terms there and set HF_TOKEN"),
        (refusal(errors.RepositoryNotFoundError, 404), "no such public model"),
        (refusal(errors.RevisionNotFoundError, 404), "no revision 'v2'"),
        (OSError(errno.ENOSPC, "No space left on device"), "set HF_HOME to a larger disk"),
        (RuntimeError("timed\nout"), "failed (timed out): try again, or download it elsewhere"),
        (refusal(errors.HfHubHTTPError, 500), "failed (500)"),
    ],
)
def test_what_the_hub_refuses(hub, error, advice):
    hub.error = error
    assert advice in refused("org/name@v2")


def test_no_network(hub, monkeypatch):
    hub.error = errors.LocalEntryNotFoundError("Got: ConnectError\nmore")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "cannot be reached: connect, or download it elsewhere and give the directory" in refused("org/name")


def test_really_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to download it" in refused("no-such-organisation/no-such-model")
