"""Tasks: pairs of clean and corrupted prompts with answers.

* `builder.py`, `builtin.py`, `ioi.py`, `mcqa.py`, `numbers.py`, `lexicon.py`: tasks that generate pairs, as text.
* `files.py`, `formats.py`: pairs from files and rows.
* `given.py`, `task.py`: `Task`, the user's pairs and options, checked.
* `chat.py`: prompts given as lists of messages. `spelling.py`, `answers.py`: the token ids of answers, and which of
  them are measured.
* `tokens.py`, `spans.py`, `bound.py`: `BoundTask`, a task tokenised for one model.
"""
