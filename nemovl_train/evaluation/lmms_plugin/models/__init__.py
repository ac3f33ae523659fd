"""What lmms-eval looks for in a plug-in: names of models, each in a module of that name here."""

AVAILABLE_MODELS = {"nemovl": "Nemovl"}
