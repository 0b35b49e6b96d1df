"""The trainer: `lossmith train`, a language model on real text from one command.

Read it in this order: `keys` (what can be set), `config` (where the values come from),
`corpus` and `data` (text to blocks of tokens), `model`, `tasks` (what one mode trains), `trainer`
and `progress` (the loop and what it shows), `runner` (the story), `cli` (the door).
"""
