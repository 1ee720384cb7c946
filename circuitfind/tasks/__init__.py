"""Tasks: pairs of clean and corrupted prompts with answers.

* `builder.py`, `builtin.py`, `ioi.py`, `lexicon.py`: tasks that make their own pairs, as text.
* `files.py`, `formats.py`: pairs from files and rows.
* `given.py`, `task.py`: `Task`, what the user gave, checked.
* `chat.py`: prompts that are lists of messages; `spelling.py`, `answers.py`: answers and which of their tokens count.
* `tokens.py`, `spans.py`, `bound.py`: `BoundTask`, what it becomes in a model's tokens.
"""
