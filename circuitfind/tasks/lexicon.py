"""The words of the built-in tasks: common English words that are one token after a space in GPT-2's tokenizer.

`SingleTokens` finds those that are one token in another tokenizer. Every object and event begins with a consonant
sound, so that "a" is the right article.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse pairs of words such as "France Paris, Germany Berlin"."""
    return tuple((first, second) for first, second in map(str.split, text.split(",")))


FEMALE_NAMES = _words("""
Mary Anna Emma Sarah Alice Kate Amy Lisa Laura Susan Julia Helen Jane Karen Linda Nancy Emily Jessica Rachel Rebecca
Jennifer Michelle Nicole Elizabeth Victoria Diana Maria Lucy Ruth Carol Martha Claire Anne Barbara Margaret Catherine
Christine Stephanie Amanda Melissa Heather Angela Andrea Samantha Hannah Olivia Sophie Molly Jenny Sally Betty Julie
Katie Vanessa Natalie Erin Caroline Ellen Charlotte Naomi
""")
MALE_NAMES = _words("""
John Tom James Paul Peter David Michael Robert William Richard Thomas George Charles Daniel Matthew Andrew Steven Kevin
Brian Edward Ryan Jason Eric Stephen Scott Adam Patrick Jack Henry Simon Frank Joe Bob Jim Mike Dan Ben Luke Oliver
Harry Arthur Albert Alan Philip Gary Keith Roger Carl Bruce Fred Howard Martin Nathan Aaron Kyle Sean Anthony Joshua
Nicholas Benjamin
""")
# from children's stories, for models with a small vocabulary; none of these is in the lists above
STORY_NAMES = _words("Lily Tim Timmy Mia Max Tommy Sue Sam Jill Billy")
PLACES = _words("""
store park school garden station hospital restaurant office house library museum market beach church airport hotel
theater kitchen farm forest island bank bridge castle harbor village river lake stadium factory palace temple gallery
shop club tower
""")
OBJECTS = _words("""
ring book ball cup map key letter box bag hat gift phone camera ticket pen coin flower cake bottle watch knife lamp
guitar coat shirt chair card toy basket blanket picture message drum drink snack basketball computer bone necklace
sandwich
""")
ADJECTIVES = _words("""
great good nice kind smart funny strong brave young old happy quiet serious clever famous rich poor honest busy careful
lovely special calm proud friendly gentle polite popular modest loyal patient talented
""")
PEOPLE = _words("""
friend person student writer singer player artist worker neighbor leader speaker runner dancer reader driver lawyer
""")
COLORS = _words("red blue green black white brown gray yellow pink purple orange gold silver")
EVENTS = _words("""
war campaign siege conflict voyage expedition project reign journey trial battle crisis strike debate rebellion
revolution study construction partnership marriage friendship celebration tour mission dispute treaty famine drought
plague festival program raid search struggle truce feud peace rule career contract
""")
_REGULAR_NOUNS = _words("""
key cabinet dog cat boy girl book car tree house teacher student doctor friend brother sister player king queen bird
horse picture letter river road window door table chair bottle ship boat plane train truck artist author writer farmer
soldier officer guard lawyer nurse pilot driver singer actor parent flower garden machine computer phone camera lamp
ball toy game song
""")
_IRREGULAR_NOUNS = _pairs("box boxes, bus buses, story stories, child children")
NOUNS = (*((noun, noun + "s") for noun in _REGULAR_NOUNS), *_IRREGULAR_NOUNS)  # singular and plural
# country and capital, each by its most common one-word English name
CAPITALS = _pairs("""
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Ireland Dublin, Austria
Vienna, Hungary Budapest, Poland Warsaw, Greece Athens, Sweden Stockholm, Norway Oslo, Denmark Copenhagen, Finland
Helsinki, Belgium Brussels, Russia Moscow, Ukraine Kiev, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Iraq Baghdad, Iran
Tehran, Syria Damascus, Lebanon Beirut, Afghanistan Kabul, India Delhi, China Beijing, Japan Tokyo, Korea Seoul,
Thailand Bangkok, Vietnam Hanoi, Canada Ottawa, Cuba Havana, Peru Lima
""")
# names of arguments in code, and nouns that fill a docstring without describing any argument
IDENTIFIERS = _words("""
load size files last first name value data index count text path file key list node type model user group field date
time line word code test row column item state image page event target source label token output input buffer client
server host port method object string number result status message title body link tag style color width height depth
level order root parent query limit format mode scope version address session
""")
DESCRIPTIONS = _words("""
price control action cost issue process position course research subject force matter health mind paper section
activity building sense staff team language plan practice evidence ground game food union role land art support range
stage trade voice field history account material care record rate
""")
