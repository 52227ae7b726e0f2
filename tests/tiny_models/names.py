"""Families, and the kinds of them, by the names that `tiny_checkpoint` takes."""

MIXED = ("qwen3-vl-moe", "qwen3.5-moe")  # of experts: served as the families before the dash; so is "internvl-moe"
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", *MIXED)
PALIGEMMA = ("paligemma", "paligemma2")
SMOLVLM = ("smolvlm", "smolvlm2")
KEEP_NOTHING = PALIGEMMA  # of a prompt from one step to the next
KEEP_A_STATE = ("qwen3.5", "qwen3.5-moe", "lfm2-vl")  # which serves where all of the text before it is the same
FAMILIES = (*QWEN, *PALIGEMMA, "gemma3", "gemma4", "glm4v", "lfm2-vl", "internvl", "mistral3", "molmo2", *SMOLVLM)
# Molmo2 on Qwen3, and its kind on OLMo 3.
MOLMO2 = ("molmo2", "molmo2-o")
MISTRAL = ("mistral3", "mistral3-small")  # Ministral 3, and Mistral Small of the same family
# Gemma 4's larger models, of the same family: dense, and with a mixture of experts.
GEMMA4 = ("gemma4", "gemma4-31b", "gemma4-26b")
