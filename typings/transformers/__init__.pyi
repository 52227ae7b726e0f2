# For the type checker: binding transformers' own __init__, which names every model, takes it half of its time.
# Listed here: what costs nothing. Any other name is Any.
from typing import Any

from transformers.cache_utils import DynamicCache as DynamicCache
from transformers.generation.configuration_utils import GenerationConfig as GenerationConfig
from transformers.modeling_utils import AttentionInterface as AttentionInterface
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig as AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText as AutoModelForImageTextToText
from transformers.trainer_utils import set_seed as set_seed
from transformers.utils.quantization_config import BitsAndBytesConfig as BitsAndBytesConfig
from transformers.utils.quantization_config import FineGrainedFP8Config as FineGrainedFP8Config

def __getattr__(name: str) -> Any: ...
