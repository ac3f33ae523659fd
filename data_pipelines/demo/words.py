"""Short everyday words, by kind."""

ANIMALS = ("cat", "dog", "horse", "cow", "fish", "bird", "mouse", "lion", "bear", "goat", "frog", "duck")
FRUITS = ("apple", "pear", "plum", "grape", "lemon", "melon", "peach", "cherry", "mango", "fig", "lime", "kiwi")
TOOLS = ("hammer", "saw", "drill", "wrench", "knife", "brush", "shovel", "rake", "axe", "pliers", "ruler", "file")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown", "pink", "orange", "purple", "gold")
OTHERS = (
    "house", "tree", "river", "stone", "cloud", "rain", "snow", "wind", "fire", "moon", "star", "sun",
    "road", "train", "boat", "car", "plane", "wheel", "door", "table", "chair", "lamp", "book", "paper",
    "bread", "milk", "salt", "sugar", "water", "tea", "soup", "cake", "north", "south", "east", "west",
    "open", "closed", "stop", "start", "left", "right", "up", "down", "fast", "slow", "small", "large",
)  # fmt: skip
KINDS = {"animal": ANIMALS, "fruit": FRUITS, "tool": TOOLS, "colour": COLOURS}
WORDS = ANIMALS + FRUITS + TOOLS + COLOURS + OTHERS
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
