"""Tokenizer folders with chat templates of the families in use: marked and unmarked control tokens, own defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Family(NamedTuple):
    """How a family builds its prompts. `marked` tokens carry the tokenizer's special flag, `unmarked` ones do not;
    of the marked ones, only the first (bos) and the second (eos) are named in the tokenizer's config.
    """

    marked: tuple[str, ...]
    unmarked: tuple[str, ...]
    template: str


QWEN = Family(
    marked=("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>"),
    unmarked=("<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    template="""\
{%- if messages[0].role == 'system' -%}
  {%- set first, rest = messages[0].content, messages[1:] -%}
{%- else -%}
  {%- set first, rest = 'You are a model in a test.', messages -%}
{%- endif -%}
{{- '<|im_start|>system\\n' + first + '<|im_end|>\\n' -}}
{%- for message in rest -%}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if tools -%}{{- '<tool_call>' + (tools | tojson) + '</tool_call>' -}}{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
)
LLAMA3 = Family(
    marked=("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    unmarked=(),
    template="""\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
""",
)
DEEPSEEK_R1 = Family(
    marked=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    unmarked=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    template="""\
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}{%- endif -%}
  {%- if message.role == 'assistant' -%}
    {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
""",
)
MISTRAL = Family(  # its template never spells bos and eos out
    marked=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM]"),
    unmarked=(),
    template="""\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{- '[SYSTEM]' + message.content -}}{%- endif -%}
  {%- if message.role == 'user' -%}{{- '[INST]' + message.content + '[/INST]' -}}{%- endif -%}
  {%- if message.role == 'assistant' -%}{{- message.content + eos_token -}}{%- endif -%}
{%- endfor -%}
""",
)
INTERNVL = Family(  # ChatML, with a system turn of its own and marks for images
    marked=("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>", "</box>"),
    unmarked=(),
    template="""\
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\n你是测试中的模型。<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {{- '<img><IMG_CONTEXT></img>\\n' if part.type == 'image' else part.text -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
)
FAMILIES = {"qwen": QWEN, "llama3": LLAMA3, "deepseek": DEEPSEEK_R1, "mistral": MISTRAL, "internvl": INTERNVL}


def make_chat_folder(
    folder: Path,
    family: Family,
    generation: dict[str, Any] | None = None,
    added: str = "{bos} $A {eos}",
    **flags: bool,
) -> Path:
    """A folder with a byte-level tokenizer of a family, which would add tokens around any text ($A) if it were asked.

    `flags` are those of the marked tokens (rstrip, lstrip).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, **flags) for token in family.marked])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.unmarked])
    bos, eos = family.marked[:2]
    named = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    around = added.format(bos=bos, eos=eos)
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = family.template or None
    fast.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
