"""Records to packs: the data side. Imports nothing from nemovl_train."""
