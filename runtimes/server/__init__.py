"""An artifact behind OpenAI's HTTP interface, and a chat page: `fox-edge serve`.

engine.py and slots.py run the model and know nothing of HTTP; the other files are the HTTP side.
"""
