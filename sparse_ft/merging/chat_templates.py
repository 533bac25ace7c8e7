"""Chat templates by the names mergekit gives them, in Jinja."""

from __future__ import annotations

_LOOP = "{% for message in messages %}"
_END = "{% endfor %}"
_ALPACA = (
    _LOOP
    + "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    + "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    + "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    + _END
    + "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
_CHATML = (
    _LOOP
    + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_EXAONE = (
    _LOOP
    + "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    + "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    + "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
    + _END
    + "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}"
    + _LOOP
    + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    + "{{ message['content'] | trim + '<|eot_id|>' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}"
    + _LOOP
    + "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    + "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    + _END
)

CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
