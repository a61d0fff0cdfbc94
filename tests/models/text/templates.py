"""Chat templates with what published and training ones use: written for these tests, in the manner of each family."""

TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
TRAINING = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<start_of_turn>assistant\\n' }}
        {%- generation %}
        {{- message.content + '<end_of_turn>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<start_of_turn>' + message.role + '\\n' + message.content + '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>assistant\\n' }}
{%- endif %}
"""
TRAINING_LOOSE = """\
{% for message in messages %}
  {% if message['role'] == 'assistant' %}
<start_of_turn>model
  {% generation %}
{{ message['content'] }}<end_of_turn>
  {% endgeneration %}
  {% else %}
<start_of_turn>{{ message['role'] }}
{{ message['content'] }}<end_of_turn>
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""
PARTS_ONLY = """\
{{ bos_token }}
{%- for message in messages -%}
    <start_of_turn>{{ message.role }}
    {%- for part in message.content -%}
        {%- if part.type == 'text' -%}
            {{- '\\n' + part.text | trim -}}
        {%- elif part['type'] == 'image' -%}
            <image>
        {%- endif -%}
    {%- endfor -%}
    <end_of_turn>
{%- endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>assistant{%- endif -%}
"""
EITHER = """\
{%- macro text_of(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}
    {{- '<start_of_turn>system\\n' + text_of(messages[0].content) + '<end_of_turn>\\n' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- set content = text_of(message.content) %}
    {%- set thought = '' %}
    {%- if message.reasoning_content is string %}
        {%- set thought = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<start_of_turn>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and thought %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content.lstrip('\\n') + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
SYSTEM_FIRST = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set prefix = messages[0]['content'] + '\\n\\n' %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set prefix = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- elif message['content'] is iterable %}
        {%- for item in message['content'] %}
            {%- if item['type'] == 'text' %}
                {{- item['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- else %}
        {{- raise_exception('Invalid content type') }}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}
"""
HEADERS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<start_of_turn>' + "
    "message['role'] + '<end_of_turn>\n\n'+ message['content'] | trim + '<eos>' %}{% if loop.index0 == 0 "
    "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<start_of_turn>assistant<end_of_turn>\n\n' }}{% endif %}"
)
AS_JSON = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set turn = {'text': message.content, 'role': message.role} %}
    {{- turn | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}
    {{- [message.content] | tojson(indent=2) }}
    {{- message.content | tojson }}
{%- endfor %}
{{- '<end_of_turn>' + strftime_now('%Y') }}
"""
NAMES = (
    "{% for message in messages %}<start_of_turn>{{ message.role }}"
    "{% if message.name is defined %} ({{ message.name }}){% endif %}"
    "{{ '\n' + message.content }}<end_of_turn>\n{% endfor %}"
)
FIRST_PART = (
    "{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content[0].text }}<end_of_turn>\n"
    "{% endfor %}"
)
FILTERED = (
    "{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}<end_of_turn>\n"
    "{% endfor %}"
)
TEMPLATES = {
    "turns": TURNS,
    "training": TRAINING,
    "training, loose": TRAINING_LOOSE,
    "either": EITHER,
    "system first": SYSTEM_FIRST,
    "headers": HEADERS,
    "as json": AS_JSON,
    "names": NAMES,
}
"""Those that take plain texts."""
OF_PARTS = {"parts only": PARTS_ONLY, "either": EITHER, "system first": SYSTEM_FIRST, "filtered": FILTERED}
"""Those that take lists of parts."""
