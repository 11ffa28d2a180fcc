"""Words that keys and lists are made of."""

from __future__ import annotations

import random
import string
import uuid


def _words(text: str) -> tuple[str, ...]:
    return tuple(sorted(set(text.split())))


ADJECTIVES = _words("""
able amber ample ancient arctic ashen awake azure bashful blunt bold brave breezy brief bright brisk
broad calm candid careful chilly civil clean clear clever coarse cosy crisp curly daring dark dear
deep dense distant dizzy dry dusty eager early earthy easy eerie elder empty exact fair faint famous
fancy feeble fierce final firm flat fluffy foggy fond fragile frank fresh frosty frugal gentle giant
glad gloomy glossy golden grand grateful green grim handy happy harsh hasty heavy hidden hollow
honest huge humble hungry icy idle jolly keen kind lame large late lazy lean light little lively
lofty lone loud loyal lucky mellow merry mighty mild misty modest moist muddy narrow neat noble
noisy odd olive open pale patient plain pleasant polite proud pure quaint quick quiet rapid rare
ready rich rigid ripe rosy rough round royal rusty salty scarce sharp shiny short shy silent silver
simple sleepy slim slow smart smooth sober soft solid sour spare spicy stale steady steep sticky
stiff stormy strict strong sturdy subtle sudden sunny sweet swift tall tame tender thin tidy tiny
tired tough tranquil true urban vague vast velvet vivid warm wary weak weary wide wild windy wise
witty wooden young zesty
""")

NOUNS = _words("""
acorn actor airport album almond anchor ankle apple apron arch armour arrow atlas attic autumn axle
badge bakery balcony ballad bamboo banjo barley barrel basil basket beach beacon beaver bell bench
berry bishop blanket blossom boat bonnet bottle bowl branch brass bread brick bridge brook broom
bucket buffalo bugle butter button cabbage cabin cactus camel candle canoe canvas canyon captain
carpet carrot castle cedar cellar chain chalk chapel cherry chess chimney cider cinema circus
clarinet cliff clock clover coast cobweb coffee comet compass copper coral cotton cradle crane
crayon cricket crown crystal curtain cymbal dagger daisy desert diamond dolphin donkey door dragon
drawer drum eagle easel echo elbow engine falcon farmer feather fence ferry fiddle field fig flag
flame flute forest fossil fountain fox frame galaxy garden garlic gate giraffe glacier glove goose
grape gravel guitar hammer harbour harp hat hawk hazel hedge helmet herb heron hill honey hook horse
island ivy jacket jar jewel jungle kayak kettle key kite kitten ladder lagoon lake lamp lantern
lemon leopard letter library lighthouse lily lion lizard lobster lock lotus magnet mango maple
marble market marsh meadow melon mill mirror mitten monkey moon mosaic moth mountain mule museum
needle nest notebook nutmeg oak oasis oboe ocean office olive onion orbit orchard otter owl oyster
paddle palace panda panther paper parrot path peach pearl pebble pelican pencil pepper piano pigeon
pillow pine pirate planet plum pocket pond poppy potato prairie puppet pyramid quarry quilt rabbit
radio raft raven reef ribbon ridge river robin rocket rope saddle saffron sail salmon sandal saturn
scarf school scooter shadow shell shepherd ship shore shovel signal sister skate sky sled snail
sparrow spider spoon spruce stable star statue stove straw stream summit swan table tailor teacher
temple thimble thistle thunder tiger timber tinsel toast tower tractor train trumpet tulip tunnel
turtle umbrella valley vase village violet violin wagon walnut walrus water whale wheat whistle
willow window winter wizard wolf yarn zebra
""")

VERBS = _words("""
accept admire advise allow answer arrange arrive avoid bake balance begin believe belong blend
borrow bounce build carry celebrate choose climb collect compare complain connect consider cook
count create decide deliver describe design discover discuss divide dream drift earn encourage enjoy
escape examine expect explain explore finish follow forget forgive gather glance grow guess happen
hesitate hurry ignore imagine improve include inform inspect introduce invent invite join juggle
knit laugh learn listen manage measure mention mumble notice obey observe offer ordain paint pause
perform persuade plant polish prefer prepare pretend promise protect provide publish receive
recommend refuse relax remember remove repair repeat reply rescue return reveal scatter search
select settle shiver sing sketch smile solve sparkle spend stumble suggest supply surround teach
tremble trust understand unpack visit wander whisper wonder
""")

WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))
PAIRS = len(ADJECTIVES) * len(NOUNS)


def pair(index: int) -> str:
    """``adjective-noun`` number ``index`` of ``PAIRS``."""
    return f"{ADJECTIVES[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}"


def new_word(rng: random.Random) -> str:
    """``adjective-noun``."""
    return pair(rng.randrange(PAIRS))


def new_number(rng: random.Random) -> str:
    """Seven digits, the first one not 0."""
    return str(rng.randrange(10**6, 10**7))


def new_uuid(rng: random.Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def new_letters(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def new_variable(rng: random.Random, length: int = 5) -> str:
    """Capital letters."""
    return new_letters(rng, string.ascii_uppercase, length)
