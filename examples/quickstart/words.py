"""The English words of the quickstart's synthetic corpora, by topic.

A topic names its roles / places / things / verbs / adjectives. Every verb takes an object; what the rules of
``make_corpus.inflect`` do not cover stands in its table of exceptions.
"""

TOPICS = {
    "bakery": "baker apprentice customer / kitchen bakery cellar / loaf cake pie biscuit oven tray bowl spoon "
    "apron basket recipe jar cup plate / bake taste mix slice cool wrap serve order / warm fresh "
    "sweet salty burnt soft",
    "farm": "farmer shepherd neighbour / barn field stable / cow goat horse hen cart fence bucket gate "
    "tractor lamb plough pumpkin turnip saddle / feed water gather plant harvest milk chase repair / "
    "muddy brown fat hungry ripe old",
    "harbour": "sailor captain fisher / harbour boat lighthouse / net anchor sail rope barrel lantern mast crab "
    "map oar flag hook lobster gull / pull lower load tow follow mend watch lift / wet salty rusty "
    "long heavy torn",
    "school": "teacher pupil librarian / classroom library yard / book pencil desk chair letter poem question "
    "lesson ruler notebook picture clock bell song / open close copy answer explain learn discuss "
    "correct / short difficult easy new thin clever",
    "workshop": "carpenter painter builder / workshop shed attic / table shelf hammer nail ladder saw board "
    "window door lamp drawer cupboard brush bench / paint measure polish fix varnish hammer clean "
    "replace / broken wooden smooth sharp square dusty",
    "market": "merchant seller cook / market shop square / apple pear onion carrot melon plum coin bag crate "
    "scale ribbon carpet candle kettle / weigh count offer pack choose price collect display / cheap "
    "expensive round green juicy small",
    "forest": "hunter ranger traveller / forest cabin valley / tree mushroom berry trail tent axe squirrel nest "
    "branch deer fox owl stone stream / discover observe cross collect climb photograph notice "
    "remember / dark tall quiet wild hidden narrow",
    "hospital": "doctor nurse patient / hospital ward pharmacy / bandage needle bottle bed blanket report "
    "thermometer pillow tablet chart mask glove bill form / examine check label order wash inspect "
    "record prepare / clean white urgent sterile empty careful",
    "railway": "driver guard passenger / station platform carriage / train ticket suitcase engine timetable "
    "signal whistle parcel newspaper uniform bridge tunnel seat coat / stamp carry announce miss load "
    "clean delay stop / late crowded slow fast yellow noisy",
    "garden": "gardener aunt uncle / garden greenhouse terrace / rose tulip shovel hose pot bush seed weed bee "
    "butterfly tomato bean rake hedge / water plant pick trim pour admire dry cover / pretty red tiny "
    "blue fragrant tall",
    "theatre": "actor singer director / theatre stage hall / costume curtain violin drum mirror script hat wig "
    "mask ticket poster piano spotlight crown / play repeat practise borrow hang tune applaud carry / "
    "golden funny famous loud strange velvet",
    "office": "manager clerk engineer / office corridor archive / printer computer folder contract stamp phone "
    "envelope screen keyboard invoice calendar key badge drawer / sign print file check mention "
    "forward study finish / important secret missing complete digital thick",
}
MEN = (
    "Adam Ben Carl Daniel Edward Frank George Henry Jack Leo Martin Noah Oscar Peter Robert Simon Thomas Victor".split()
)
WOMEN = (
    "Alice Beth Clara Diana Emma Fiona Grace Helen Irene Julia Karen Laura Maria Nora Olivia Rose Sarah Vera".split()
)
TOWN_HEADS = (
    "ash black bright clay cold crow east elm fair fox green hazel high mill north oak red stone west wood".split()
)
TOWN_TAILS = "bridge brook bury field ford ham haven hill land ley port side stead ton wick worth".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PARTS = "morning afternoon evening night".split()
MONTHS = "January February March April May June July August September October November December".split()
MANNERS = "quickly slowly carefully quietly happily together alone again".split()
FEELINGS = "tired happy sad angry hungry proud bored surprised worried glad".split()
WEATHERS = "rainy sunny windy foggy cloudy snowy stormy mild".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
GIVING = "hand offer return deliver".split()
