"""Concepts of the generated scenes: things that people can name at sight, with names that people use.

The list is written by hand: no rule would keep such things and drop faces, flags, letters, symbols, clock hours, zodiac
signs, skin tones and drawings that differ in a detail. Things whose drawings look alike at 64 pixels (orangutan and
monkey, taxi and car) or like anything (a coin, a sponge) are left out. Unicode's names come from the package ``emoji``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import emoji

# One word per concept: EMOJI_NAME[=readable_name][:form]. The form is "some" for uncountable things ("some broccoli"),
# "pair" for things that come in pairs ("a pair of scissors"), or else the plural if `_plural` does not give it.
_CONCEPTS = """
monkey gorilla dog fox raccoon cat lion tiger horse unicorn zebra deer:deer cow pig ram goat camel llama giraffe
elephant rhinoceros=rhino hippopotamus=hippo mouse:mice rabbit chipmunk=squirrel hedgehog bat bear polar_bear koala
panda sloth kangaroo turkey chicken rooster hatching_chick bird penguin dove swan owl dodo flamingo peacock parrot
frog crocodile turtle lizard snake dragon sauropod=dinosaur T-Rex=t-rex whale dolphin seal fish:fish blowfish:blowfish
shark octopus spiral_shell=seashell coral:some jellyfish:jellyfish crab lobster shrimp:shrimp snail butterfly
bug=caterpillar honeybee=bee lady_beetle=ladybug spider scorpion worm spider_web feather paw_prints:some

bouquet=bouquet_of_flowers cherry_blossom=pink_flower rose sunflower tulip potted_plant evergreen_tree=pine_tree
palm_tree cactus maple_leaf:maple_leaves mushroom nest_with_eggs:nests_with_eggs wood=log rock
Christmas_tree=christmas_tree

grapes:some watermelon lemon banana pineapple red_apple pear cherries:some strawberry blueberries:some tomato:tomatoes
coconut avocado eggplant potato:potatoes carrot ear_of_corn hot_pepper=chili_pepper bell_pepper
leafy_green=lettuce:some broccoli:some garlic:some onion beans:some croissant pretzel pancakes:some
cheese_wedge=piece_of_cheese meat_on_bone=piece_of_meat poultry_leg=chicken_leg bacon:some hamburger french_fries:some
pizza hot_dog sandwich:sandwiches taco egg cooking=fried_egg green_salad=bowl_of_salad popcorn:some salt=salt_shaker
sushi:some soft_ice_cream=ice_cream_cone doughnut=donut cookie birthday_cake shortcake=slice_of_cake cupcake pie
chocolate_bar candy=piece_of_candy lollipop honey_pot=jar_of_honey baby_bottle hot_beverage=cup_of_coffee teapot
bottle_with_popping_cork=bottle_of_champagne wine_glass cocktail_glass beer_mug cup_with_straw=soda_cup ice=ice_cube
fork_and_knife:forks_and_knives kitchen_knife:kitchen_knives spoon amphora

world_map compass mountain volcano:volcanoes camping=campsite beach_with_umbrella=beach classical_building=temple
brick=brick_wall house factory castle Tokyo_tower=tower Statue_of_Liberty=statue church mosque
shinto_shrine=torii_gate fountain tent carousel_horse ferris_wheel roller_coaster barber_pole moai=stone_head

locomotive=steam_train tram bus ambulance fire_engine=fire_truck automobile=car tractor motorcycle
manual_wheelchair=wheelchair bicycle skateboard roller_skate fuel_pump=gas_pump vertical_traffic_light=traffic_light
stop_sign construction=road_barrier anchor ring_buoy=lifebuoy sailboat canoe passenger_ship=cruise_ship airplane
parachute helicopter mountain_cableway=cable_car satellite rocket flying_saucer=ufo

bellhop_bell=service_bell luggage=suitcase hourglass_done=hourglass watch alarm_clock thermometer crescent_moon sun
ringed_planet=planet star cloud cloud_with_lightning=thundercloud tornado:tornadoes rainbow umbrella
high_voltage=lightning_bolt snowflake snowman:snowmen comet fire:some droplet=water_drop
jack-o-lantern=halloween_pumpkin fireworks:some balloon party_popper ribbon=red_bow wrapped_gift=gift_box
military_medal=medal trophy soccer_ball american_football=football flying_disc=frisbee bowling=bowling_pins:some
ping_pong=ping_pong_paddle badminton=badminton_racket boxing_glove flag_in_hole=golf_hole ice_skate
fishing_pole=fishing_rod bullseye=dartboard yo-yo kite pool_8_ball=eight_ball video_game=game_controller joystick
game_die=dice:dice puzzle_piece teddy_bear piñata=pinata mirror_ball=disco_ball nesting_dolls=nesting_doll
framed_picture artist_palette=paint_palette thread=spool_of_thread

sunglasses:pair goggles:pair safety_vest necktie=shirt_and_tie:shirts_and_ties t-shirt jeans:pair scarf:scarves
gloves:pair socks:pair dress kimono purse backpack shopping_bags=shopping_bag running_shoe=sneaker
high-heeled_shoe=high_heel woman’s_boot=boot crown top_hat graduation_cap rescue_worker’s_helmet=firefighter_helmet
lipstick ring gem_stone=diamond megaphone postal_horn=french_horn bell microphone headphone=headphones:pair saxophone
accordion guitar musical_keyboard=piano trumpet violin drum maracas:pair harp trombone telephone electric_plug laptop
desktop_computer printer floppy_disk optical_disk=compact_disc abacus:abacuses movie_camera film_frames=film_strip
clapper_board television camera magnifying_glass_tilted_left=magnifying_glass candle light_bulb flashlight
red_paper_lantern=paper_lantern open_book books=stack_of_books scroll newspaper money_bag dollar_banknote=dollar_bill
envelope package=cardboard_box closed_mailbox_with_raised_flag=mailbox pencil paintbrush:paintbrushes briefcase
calendar pushpin paperclip scissors:pair wastebasket locked=padlock key hammer axe dagger bomb
bow_and_arrow:bows_and_arrows shield wrench screwdriver gear balance_scale toolbox magnet ladder shovel test_tube
dna=dna_strand microscope telescope syringe pill adhesive_bandage=bandage stethoscope door window bed
couch_and_lamp=couch toilet plunger shower bathtub broom basket bucket bubbles:some toothbrush:toothbrushes
fire_extinguisher shopping_cart cigarette coffin headstone=gravestone brain tooth:teeth bone
anatomical_heart=human_heart ear eye nose robot ghost alien skull clown_face=clown pile_of_poo=poop astronaut mermaid
Santa_Claus=santa folding_hand_fan=hand_fan performing_arts=theater_masks:some treasure_chest
"""


Article = Literal["a", "an", "the", ""]
Form = Literal["count", "pair", "some"] | Article
_FORMS: dict[str, Form] = {"pair": "pair", "some": "some"}


@dataclass(frozen=True)
class Concept:
    """One nameable thing.

    ``name`` is singular and lower case ("loaf of bread"), ``plural`` its plural. ``form`` says how it is counted:
    ``"count"`` (a dog, two dogs), ``"pair"`` (a pair of jeans, two pairs of jeans) or ``"some"`` (at most one drawing
    in a scene, since nobody says "two broccolis" and two drawings are still "some broccoli"). A form that is an article
    precedes the name as it is ("an" F-22, "" for none) and is for one picture in a scene, as well.
    """

    name: str
    plural: str
    form: Form
    emoji: str


@lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """All concepts in a fixed order; names are unique.

    Raises:
        LookupError: the installed ``emoji`` lacks a concept of the list.
    """
    return tuple(map(_parse, _CONCEPTS.split()))


def unicode_names(concept: Concept) -> list[str]:
    """Unicode's name of the concept's emoji, then its aliases and our own name: lower case, words joined by hyphens."""
    data = emoji.EMOJI_DATA[concept.emoji]
    names = (data["en"], *data.get("alias", ()), concept.name)
    return [name.strip(":").lower().replace("_", "-").replace(" ", "-").replace("’", "") for name in names]


def _parse(entry: str) -> Concept:
    head, _, form = entry.partition(":")
    code, _, readable = head.partition("=")
    name = (readable or code).replace("_", " ").lower()
    character = emoji.emojize(f":{code}:")
    if character == f":{code}:":
        raise LookupError(f"concept {name!r}: package emoji {emoji.__version__} has no emoji named {code!r}")
    plural = name if form in _FORMS else form.replace("_", " ") or _plural(name)
    return Concept(name, plural, _FORMS.get(form, "count"), character)


def _plural(name: str) -> str:
    """Regular English plural; the head of "cup of coffee" is inflected."""
    head, of, rest = name.partition(" of ")
    if head.endswith(("s", "x", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + of + rest
