"""Small chat templates of the shapes that real ones have, and tokenizers with their special tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, tiny_tokenizer

# Header ids, content trimmed, BOS with the first message, the system message always there with a date.
LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# The assistant is called model, the system message is merged into the first user turn, roles must alternate.
GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set first = '' %}{% endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# No generation prompt, EOS after the assistant, system message and tools before the last user message only.
MISTRAL = """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- endif %}
{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
        {%- if system is defined and message == last %}{{ '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}
        {%- else %}{{ '[INST] ' + message.content + '[/INST]' }}{% endif %}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('ids have 9 letters') }}
            {%- endif %}
            {{- call.function | tojson }}{{ '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
    {%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}"""

# Tools in the system message; reasoning is shown after the last question only, and there even where it is empty.
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# The generation prompt opens the reasoning, which turns do not keep; calls want their arguments as text.
REASONER = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] }}
        {%- for call in message.tool_calls or [] %}
            {{- '<|call|>' + call.function.name + '\n' + call.function.arguments + '<|call_end|>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}{{ '<|User|>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# Messages of the past end with another token than the last one; a call goes without content.
HARMONY = """{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.content %}{{ raise_exception('A call has no content') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant to=' + call.name + '<|message|>' + call.arguments | tojson + '<|call|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content }}
        {{- '<|return|>' if loop.last and message.role == 'assistant' else '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# No end-of-turn token: the header of the next message stops the turn.
OPEN_ENDED = """{%- for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

# ChatML that says itself what the assistant writes.
MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}{{ message.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES: dict[str, tuple[str, str, list[str]]] = {
    "chatml": (CHATML, "<|im_end|>", ["<|im_start|>"]),
    "llama3": (LLAMA3, "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, "</s>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
    "qwen": (QWEN, "<|im_end|>", ["<|im_start|>"]),
    "reasoner": (REASONER, "</s>", ["<|User|>", "<|Assistant|>", "<|call|>", "<|call_end|>"]),
    "harmony": (HARMONY, "<|return|>", ["<|start|>", "<|message|>", "<|end|>", "<|call|>"]),
    "open": (OPEN_ENDED, "</s>", ["<|user|>", "<|assistant|>"]),
    "marked": (MARKED, "<|im_end|>", ["<|im_start|>"]),
}


def shape(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the chat template and the special tokens of a shape."""
    template, eos, special = TEMPLATES[name]
    return tiny_tokenizer(template, eos_token=eos, additional_special_tokens=special)
