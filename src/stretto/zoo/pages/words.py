"""Word pools that the families share."""

NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kira Leo Mia Noah Olga Paul Quinn Rosa Sam Tina "
    "Uma Vera Will Xena Yara Zoe Amir Bela Carl Dora"
).split()
FRUIT = "apple pear plum lemon cherry melon grape peach mango fig kiwi lime banana berry orange papaya".split()
TOOLS = "hammer saw drill brush ladder rope wrench bucket shovel nail screw glue tape file knife pump".split()
ANIMALS = "cat dog owl fox bear wolf deer mouse horse goat duck frog crow seal hare swan".split()
COLOURS = "red blue green black white brown pink grey gold silver purple orange".split()
CITIES = (
    "Paris Rome Oslo Lima Cairo Delhi Tokyo Quito Berlin Madrid Vienna Athens Dublin Prague Lisbon Warsaw"
).split()
ROOMS = "kitchen office garden hall studio library garage attic cellar lobby".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TOPICS = "budget launch hiring design safety travel research training sales music history garden".split()
THINGS = FRUIT + TOOLS + ANIMALS
VERBS = "paint count sort wash carry open close check clean move watch buy sell draw lift find".split()
