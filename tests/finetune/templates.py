"""Chat templates of the kinds that are about: written for these tests, in the manner of well-known families."""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As Llama 3: headers, the content trimmed, an end of turn, no line break behind it.
HEADERS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
# As Llama 2: no header before an answer, and nothing that asks for one.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|end|>{% endif %}{% endfor %}"
)
# As Qwen3: the last answer is written with room for thoughts, those before it without.
THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# The template itself says which part is the answer.
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# It begins to answer where it asks for one, and forgets that later: what was said cannot be found in it.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
# It changes what was said.
SHOUTING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content | upper }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
GOOD = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS, "thoughts": THOUGHTS, "marked": MARKED}
