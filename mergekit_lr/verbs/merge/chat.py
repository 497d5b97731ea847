"""The chat template of a merged model: an input's, the one that most inputs have, a well-known format, or given text.

The formats are written here from their definitions: what stands before and after each message, and what asks for an
answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.checkpoint import read_config
from mergekit_lr.errors import MismatchError
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.merge.sources import Source
from mergekit_lr.verbs.merge.tokenizer import tokenizer_folder

FILE = "chat_template.jinja"
CHATML = """
{%- for turn in messages -%}
{{ "<|im_start|>" ~ turn.role ~ "\\n" ~ turn.content ~ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""
LLAMA3 = """
{%- macro head(role) -%}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\\n\\n" }}{%- endmacro -%}
{{- bos_token -}}
{%- for turn in messages -%}{{ head(turn.role) ~ turn.content | trim ~ "<|eot_id|>" }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ head("assistant") }}{%- endif -%}
"""
MISTRAL = """
{%- set wait = namespace(system="") -%}
{{- bos_token -}}
{%- for turn in messages -%}
{%- if turn.role == "system" -%}{%- set wait.system = turn.content ~ "\\n\\n" -%}
{%- elif turn.role == "user" -%}
{{- " [INST] " ~ wait.system ~ turn.content ~ " [/INST]" -}}{%- set wait.system = "" -%}
{%- elif turn.role == "assistant" -%}{{- " " ~ turn.content ~ eos_token -}}
{%- else -%}{{- raise_exception("this format has system, user and assistant, not " ~ turn.role) -}}
{%- endif -%}
{%- endfor -%}
"""
ALPACA = """
{%- set titles = {"user": "Instruction", "assistant": "Response", "user_context": "Input"} -%}
{%- for turn in messages -%}
{%- if turn.role in titles -%}{{- "### " ~ titles[turn.role] ~ ":\\n" -}}{%- endif -%}
{{- turn.content | trim -}}
{%- if not loop.last or add_generation_prompt -%}{{- "\\n\\n" -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "### Response:\\n" -}}{%- endif -%}
"""
EXAONE = """
{%- if messages and messages[0].role != "system" -%}{{- "[|system|][|endofturn|]\\n" -}}{%- endif -%}
{%- for turn in messages -%}
{{- "[|" ~ turn.role ~ "|]" ~ turn.content ~ ("\\n" if turn.role == "user" else "[|endofturn|]\\n") -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "[|assistant|]" -}}{%- endif -%}
"""
FORMATS = {"alpaca": ALPACA, "chatml": CHATML, "exaone": EXAONE, "llama3": LLAMA3, "mistral": MISTRAL}


def chat_template(recipe: Recipe, sources: Mapping[str, Source], template: Source) -> str | None:
    """The text of the template that the recipe asks for; None leaves that of the tokenizer.

    ``auto`` is what most models have, of two as frequent ones the first; ``base`` the template's; a model's name its.

    Raises:
        UsageError: neither one of these nor Jinja; with its line. MismatchError: the model named has none.
    """
    asked = recipe.document.chat_template
    if asked is None:
        return None
    if asked == "auto":
        found = [text.strip() for source in sources.values() if (text := template_of(source))]
        return Counter(found).most_common(1)[0][0] if found else None
    if asked == "base" or asked in sources:
        source = template if asked == "base" else sources[asked]
        text = template_of(source)
        if text is None and asked != "base":
            raise MismatchError(f"{asked}: has no chat template to take")
        return text
    if asked in FORMATS:
        return FORMATS[asked].strip()
    if "{" not in asked:
        known = ", ".join(FORMATS)
        raise recipe.place.error(
            ("chat_template",), f"{asked!r} is no template: choose auto, base, a model, {known}, or write Jinja"
        )
    return asked


def template_of(source: Source) -> str | None:
    """The chat template beside a model's tokenizer; of several the default."""
    folder = tokenizer_folder(source)
    if folder is None:
        return None
    if (file := folder / FILE).exists():
        return file.read_text(encoding="utf-8")
    found: Any = None
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = found or read_config(folder / name).get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def write_template(folder: Path, text: str) -> None:
    """Make ``text`` the one chat template of the tokenizer in ``folder``."""
    (folder / FILE).write_text(text, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    config = read_config(folder / "tokenizer_config.json")
    if config.pop("chat_template", None) is not None:
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
