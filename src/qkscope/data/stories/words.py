"""The words that the stories are made of. A name in `LONG_NAMES` is several tokens, every other word is one."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHE = _words("""
Mary Alice Emma Sarah Anna Kate Lucy Jane Ruth Clara Ella Grace Helen Irene Julia Laura Martha Nora Olive Paula Rose
Sofia Tess Vera Wendy Amy Beth Carol Diana Edith Fiona Gina Hannah Iris Joan Karen Lily Maria Nina Opal Pearl Rita
Susan Tina Una Violet Zoe Ada Bella Celia Daisy Elsa Flora Greta Hazel Ida Judy Kira Lena Mona Naomi Petra Sally
Thea Viola Willa Yara Aisha Chen Fatima Leila Mei Noor Priya Sana Yuki Amara Ines
""")
HE = _words("""
John Tom James Peter Paul Luke Adam Ben Carl David Eric Frank George Henry Ivan Jack Kevin Leo Martin Oscar
Robert Simon Victor Walter Alan Brian Colin Daniel Edward Felix Gary Harry Ian Joe Keith Louis Max Neil Owen Philip
Ralph Steven Tim Vincent Albert Bruno Conrad Dennis Emil Fred Gilbert Hugo Isaac Jacob Karl Lewis Miles Nathan Otto
Patrick Quentin Roger Samuel Theo Andre Boris Dmitri Farid Hassan Jorge Kenji Omar Rashid Sanjay Tariq Wei
""")
LONG_SHE = {
    "Annabeth": ("Anna", "beth"), "Rosalind": ("Rosa", "lind"), "Marigold": ("Mari", "gold"),
    "Theodora": ("Theo", "dora"), "Isadora": ("Isa", "dora"), "Clementine": ("Clem", "ent", "ine"),
    "Wilhelmina": ("Wil", "helm", "ina"), "Seraphina": ("Sera", "ph", "ina"), "Rosabel": ("Rosa", "bel"),
    "Christabel": ("Christ", "a", "bel"),
}  # fmt: skip
LONG_HE = {
    "Benedict": ("Ben", "edict"), "Leopold": ("Leo", "pold"), "Bartholomew": ("Bar", "tholo", "mew"),
    "Maximilian": ("Max", "imi", "lian"), "Archibald": ("Arch", "i", "bald"), "Theobald": ("Theo", "bald"),
    "Wilfred": ("Wil", "fred"), "Alfred": ("Al", "fred"), "Humbert": ("Hum", "bert"), "Cuthbert": ("Cuth", "bert"),
}  # fmt: skip
LONG_NAMES = LONG_SHE | LONG_HE
SURNAMES = _words("""
Hill Brown Stone Wood Baker Miller Fisher Potter Taylor Cook Marsh Reed Frost Lane Field West Archer Barton Carver
Dalton Ellis Foster Grant Holt Irving Jarvis Kemp Lowe Mercer Norton Osborne Parker Quinn Rowan Slater Thorne Upton
Vaughan Walsh Yates Okafor Novak Silva Tanaka Haddad Larsen Moreau Rossi Weber Costa
""")
TITLES_SHE = ("Mrs", "Miss", "Lady", "Dr", "Captain", "Professor")
TITLES_HE = ("Mr", "Sir", "Lord", "Dr", "Captain", "Professor")
TOWNS = _words("""
Ashford Brampton Calder Dunmore Elmsworth Fairhaven Glenrock Harwick Ivybridge Kelso Langley Merton Northgate
Oakham Pelham Quarry Redcliff Selby Thornbury Ulster Varley Westbrook Yarrow Zennor Ambleside Burford Corbridge
Dorset Eastleigh Farnham
""")
PLACES = _words("""
market garden library harbour school station kitchen museum bakery church farm river forest castle bridge theatre
hospital office workshop stable beach island tower mill inn barn cellar attic meadow orchard factory palace prison
cave lake hotel bank court studio gallery chapel dock village hall store shop park zoo
""")
OBJECTS = _words("""
lamp key book coat basket letter ring bottle rope drum map clock cup knife spoon mirror candle blanket pillow hammer
ladder bucket broom kettle plate ticket ribbon button coin chain wallet hat scarf glove boot shirt jacket apple pear
lemon melon cake pie loaf biscuit flute violin trumpet piano bell whistle pencil brush stamp photo painting statue
vase chair table stool bench cart wagon boat kite ball doll puzzle lantern compass telescope magnet needle thread
feather shell stone pebble nail saw shovel saddle helmet shield sword cloak crown jewel locket necklace bracelet parcel
trunk suitcase envelope notebook newspaper poster banner flag barrel crate jar tray teapot
""")
ADJECTIVES = _words("""
red blue green yellow black white brown silver golden old new small large heavy light round square broken clean dirty
bright dark soft hard warm cold dry wet smooth rough thin thick long short plain pretty strange simple cheap precious
wooden painted polished rusty empty full quiet loud narrow wide gentle famous humble hollow
""")
MOODS = _words("""
happy sad angry tired hungry proud afraid curious lonely calm worried pleased surprised ashamed grateful bored jealous
nervous cheerful sleepy
""")
JOBS = _words("""
baker tailor sailor farmer teacher doctor painter singer hunter miner driver cook guard judge clerk nurse pilot poet
carpenter shepherd blacksmith fisherman gardener librarian merchant soldier weaver builder
""")
ANIMALS = _words("""
cat dog horse cow goat pig duck hen rabbit fox bear lion tiger monkey parrot owl crow swan frog snake turtle squirrel
donkey camel
""")
NUMBERS = _words("two three four five six seven eight nine ten eleven twelve twenty")
MONTHS = _words("January February March April May June July August September October November December")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

GAVE_TO = _words("gave handed passed showed sold offered lent brought sent carried returned")
BOUGHT_FOR = _words("bought found made painted fetched repaired kept saved")
TOOK = _words("took found lost hid broke cleaned dropped cut moved painted counted kept stole wanted carried mended")
WENT = _words("went walked ran rode hurried sailed drove travelled")
DID = _words("smiled waited slept laughed cried danced sang worked listened whispered nodded sneezed shouted rested")
ADVERBS = _words("quietly slowly quickly happily sadly carefully suddenly softly proudly loudly again alone")
TIMES = _words("morning evening afternoon night")
BE = (("is", "are"), ("was", "were"))
DOES = (
    ("has", "have"), ("needs", "need"), ("gets", "get"), ("stands", "stand"), ("seems", "seem"), ("looks", "look"),
    ("belongs", "belong"), ("makes", "make"), ("goes", "go"), ("shows", "show"),
)  # fmt: skip
# What may follow each verb of DOES, in its order: the verb and its ending agree in sense.
ENDINGS = (
    "a price", "a wash", "dusty in summer", "near the door", "older every year", "best in the sun", "to the town",
    "a noise at night", "back next week", "a scratch",
)  # fmt: skip
BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"))
IRREGULAR = {
    "knife": "knives", "loaf": "loaves", "brush": "brushes", "bench": "benches",
    "fox": "foxes", "fisherman": "fishermen", "compass": "compasses", "necklace": "necklaces",
}  # fmt: skip


def plural(noun: str) -> str:
    """`noun` in the plural."""
    return IRREGULAR.get(noun, noun + "s")


def article(word: str) -> str:
    """`a` or `an`, by the word that follows."""
    return "an" if word[0].lower() in "aeiou" else "a"
