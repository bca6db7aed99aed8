"""The teacher: its weights (EMA) and what it is shown (prompts)."""

from unisd_jax.teacher.ema import ema_update as ema_update
from unisd_jax.teacher.ema import ema_update_measured as ema_update_measured
from unisd_jax.teacher.ema import start_ema as start_ema
from unisd_jax.teacher.ema import weight_distance as weight_distance
from unisd_jax.teacher.prompts import auxiliary_messages as auxiliary_messages
from unisd_jax.teacher.prompts import induction_messages as induction_messages
from unisd_jax.teacher.prompts import privileged_messages as privileged_messages
from unisd_jax.teacher.prompts import student_messages as student_messages
from unisd_jax.teacher.prompts import teacher_messages as teacher_messages
