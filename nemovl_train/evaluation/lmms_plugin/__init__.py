"""Lets lmms-eval run an exported folder: `LMMS_EVAL_PLUGINS=nemovl_train.evaluation.lmms_plugin`."""
