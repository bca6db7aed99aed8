"""One decoder for every family, Hugging Face checkpoints in and out, and adapters as data."""

from unisd_jax.models.config import ModelConfig as ModelConfig
from unisd_jax.models.decoder import KVCache as KVCache
from unisd_jax.models.decoder import Model as Model
from unisd_jax.models.head import HeadOptions as HeadOptions
from unisd_jax.models.head import divergence_scores as divergence_scores
from unisd_jax.models.head import head_logits as head_logits
from unisd_jax.models.head import sampled_token_scores as sampled_token_scores
from unisd_jax.models.head import scores_with_jacobians as scores_with_jacobians
from unisd_jax.models.hf_io import hf_tensors as hf_tensors
from unisd_jax.models.hf_io import load_hf as load_hf
from unisd_jax.models.hf_io import read_config as read_config
from unisd_jax.models.hf_io import save_hf as save_hf
from unisd_jax.models.lora import Dropout as Dropout
from unisd_jax.models.lora import Lora as Lora
from unisd_jax.models.lora import LoraFactors as LoraFactors
from unisd_jax.models.lora import init_lora as init_lora
from unisd_jax.models.lora import merge as merge
from unisd_jax.models.scoring import completion_hidden as completion_hidden
from unisd_jax.models.scoring import completion_scores as completion_scores
from unisd_jax.models.scoring import join_rows as join_rows
from unisd_jax.models.scoring import map_rows as map_rows
from unisd_jax.models.scoring import split_rows as split_rows
