"""Python imports this at its start wherever the folder is on PYTHONPATH: what `support.pretended` does to a process."""

import pretended_card

pretended_card.install()
