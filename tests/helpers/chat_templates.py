"""Chat templates that do what those of well-known families do, good and bad, in a few lines each.

The turns are those of the tiny tokenizer (ChatML), so that its control tokens are written.
"""

from __future__ import annotations

from tests.helpers.tiny_model import CHAT_TEMPLATE

_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

# Take every conversation and show all of it.
WHOLE = {
    "chatml": CHAT_TEMPLATE,
    "trimming": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    + _END,
    "loops and lines": (
        "\n{%- for m in messages %}\n    {%- if m.role == 'nobody' %}{% continue %}{% endif %}\n"
        "<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
        "{%- endfor %}\n" + _END
    ),
    "json": "{{ bos_token }}{{ messages | tojson }}" + _END,
    "first token": "{{ bos_token or '' }}{{ eos_token }}{% for m in messages %}" + _TURN + "{% endfor %}" + _END,
    "system into user": (
        "{% set told = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set told.system = m.content + '\n\n' %}{% else %}<|im_start|>{{ m.role }}\n{{ told.system + m.content }}"
        "<|im_end|>{% set told.system = '' %}{% endif %}{% endfor %}" + _END
    ),
}

# Leave something out without a word.
LOSING = {
    "system": "{% for m in messages %}{% if m.role != 'system' %}" + _TURN + "{% endif %}{% endfor %}" + _END,
    "all but the last": "{% set m = messages[-1] %}" + _TURN + _END,
    "the last": "{% for m in messages %}{% if not loop.last or loop.length == 1 %}" + _TURN + "{% endif %}{% endfor %}",
    "answers": "{% for m in messages %}{% if m.role != 'assistant' %}" + _TURN + "{% endif %}{% endfor %}" + _END,
    "second turns": (
        "{% for m in messages %}{% if loop.index < 3 or loop.last %}" + _TURN + "{% endif %}{% endfor %}" + _END
    ),
    "all lines but the first": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('\n')[0] + '<|im_end|>' }}"
        "{% endfor %}"
    ),
    "the end of long texts": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content[:200] + '<|im_end|>' }}{% endfor %}"
    ),
}

# Refuse roles or orders, as Gemma and Mistral do.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    + _TURN
    + "{% endfor %}"
    + _END
)
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('Only one message') }}{% endif %}" + CHAT_TEMPLATE
BROKEN = "{{ messages[0].content.missing.attribute }}" + CHAT_TEMPLATE

# Tell today's date, as Llama 3.2, Granite and Mistral Small do.
DATED = {
    "llama": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
        "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHAT_TEMPLATE
    ),
    "granite": "<|im_start|>system\nToday's Date: {{ strftime_now('%B %d, %Y') }}.<|im_end|>\n" + CHAT_TEMPLATE,
    "mistral": (
        "\n{%- set today = strftime_now('%Y-%m-%d') %}\n{%- set parts = today.split('-') %}\n"
        "<|im_start|>system\n{{ today }}, a day of {{ parts[1] }}, {{ strftime_now('%A %-d %H:%M') }}<|im_end|>\n"
        + CHAT_TEMPLATE
    ),
}
THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}(no thoughts)\n{% endif %}"
