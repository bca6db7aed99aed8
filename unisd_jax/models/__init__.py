"""One decoder for every family, Hugging Face checkpoints in and out, and adapters as data."""

from unisd_jax.models.config import ModelConfig as ModelConfig
from unisd_jax.models.decoder import KVCache as KVCache
from unisd_jax.models.decoder import Model as Model
from unisd_jax.models.hf_io import load_hf as load_hf
from unisd_jax.models.hf_io import read_config as read_config
from unisd_jax.models.hf_io import save_hf as save_hf
from unisd_jax.models.lora import Lora as Lora
from unisd_jax.models.lora import LoraFactors as LoraFactors
from unisd_jax.models.lora import init_lora as init_lora
from unisd_jax.models.lora import merge as merge
from unisd_jax.models.scoring import completion_hidden as completion_hidden
