"""Write the embedded task `short_answers`: short questions that a model of 135M parameters can answer.

The answer is a common fact, a form of the word asked about, or stands in the question. Everything comes from the word
lists and templates below; there is no randomness. An entity (the country, adjective, name, ... that a question asks
about) belongs to one table and so to one split: no training question asks about an entity of the test split.

    python scripts/make_short_answers.py            write the two JSONL files beside the task's code
    python scripts/make_short_answers.py --check    exit 1 when the files differ from what would be written
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from unisd_jax.data.tasks.short_answers import embedded_path
from unisd_jax.io import write_text_atomic

# entity:answer, no word twice: the answer to a test question is no training entity either.
OPPOSITES = """
hot:cold up:down black:white good:bad rich:poor young:old fast:slow high:low long:short full:empty soft:hard
dark:light wet:dry clean:dirty strong:weak happy:sad love:hate left:right early:late first:last near:far
top:bottom north:south east:west true:false yes:no before:after war:peace life:death buy:sell push:pull
thick:thin wide:narrow deep:shallow rough:smooth loud:quiet inside:outside front:back above:below always:never
everything:nothing increase:decrease success:failure begin:end entrance:exit cheap:expensive friend:enemy
guilty:innocent positive:negative maximum:minimum summer:winter male:female accept:reject victory:defeat
ancient:modern public:private question:answer awake:asleep
"""
# country:continent, and for some :nationality.
COUNTRIES = """
France:Europe:French, Germany:Europe:German, Italy:Europe:Italian, Spain:Europe:Spanish,
Portugal:Europe:Portuguese, Greece:Europe:Greek, Austria:Europe:Austrian, Poland:Europe:Polish,
Hungary:Europe:Hungarian, Ireland:Europe:Irish, Norway:Europe:Norwegian, Sweden:Europe:Swedish,
Denmark:Europe:Danish, Finland:Europe:Finnish, Belgium:Europe:Belgian, Romania:Europe:Romanian,
Bulgaria:Europe:Bulgarian, Ukraine:Europe:Ukrainian, Croatia:Europe:Croatian, Serbia:Europe, Iceland:Europe,
Switzerland:Europe:Swiss, Netherlands:Europe, Japan:Asia:Japanese, China:Asia:Chinese, India:Asia:Indian,
Thailand:Asia:Thai, South Korea:Asia, Vietnam:Asia:Vietnamese, Iran:Asia:Iranian, Iraq:Asia:Iraqi, Nepal:Asia,
Pakistan:Asia:Pakistani, Indonesia:Asia:Indonesian, Afghanistan:Asia, Lebanon:Asia, Malaysia:Asia,
Mongolia:Asia, Bangladesh:Asia, Sri Lanka:Asia, Cambodia:Asia, Laos:Asia, Kenya:Africa:Kenyan,
Ethiopia:Africa:Ethiopian, Nigeria:Africa:Nigerian, Ghana:Africa, Senegal:Africa, Uganda:Africa,
Tanzania:Africa, Morocco:Africa:Moroccan, Algeria:Africa:Algerian, Tunisia:Africa, Libya:Africa:Libyan,
Sudan:Africa, Angola:Africa, Zambia:Africa, Zimbabwe:Africa, Rwanda:Africa, Peru:South America:Peruvian,
Chile:South America:Chilean, Colombia:South America:Colombian, Brazil:South America:Brazilian, Venezuela:South
America:Venezuelan, Bolivia:South America:Bolivian, Canada:North America:Canadian, Mexico:North
America:Mexican
"""
ADVERBS = """
quick:quickly careful:carefully easy:easily clear:clearly sudden:suddenly perfect:perfectly polite:politely
brave:bravely nice:nicely beautiful:beautifully angry:angrily safe:safely proud:proudly calm:calmly
kind:kindly lucky:luckily serious:seriously honest:honestly bright:brightly gentle:gently simple:simply
final:finally usual:usually eager:eagerly patient:patiently silent:silently rapid:rapidly correct:correctly
secret:secretly exact:exactly complete:completely general:generally recent:recently rare:rarely
regular:regularly
"""
AGENTS = """
teaches:teacher sings:singer dances:dancer paints:painter writes:writer drives:driver runs:runner plays:player
swims:swimmer bakes:baker farms:farmer hunts:hunter leads:leader sails:sailor builds:builder reads:reader
climbs:climber dreams:dreamer surfs:surfer skates:skater invents:inventor hikes:hiker works:worker
translates:translator designs:designer speaks:speaker
"""
PLURALS = """
cat:cats dog:dogs book:books tree:trees table:tables chair:chairs apple:apples horse:horses box:boxes
bus:buses dish:dishes church:churches fox:foxes baby:babies city:cities lady:ladies story:stories
party:parties country:countries family:families berry:berries knife:knives wife:wives wolf:wolves man:men
woman:women child:children foot:feet tooth:teeth mouse:mice goose:geese person:people potato:potatoes
tomato:tomatoes hero:heroes boy:boys girl:girls toy:toys river:rivers window:windows flower:flowers bird:birds
spider:spiders student:students island:islands king:kings bridge:bridges mountain:mountains bottle:bottles
letter:letters pencil:pencils ticket:tickets village:villages class:classes glass:glasses brush:brushes
peach:peaches bench:benches
"""
SYMBOLS = """
hydrogen:H oxygen:O carbon:C nitrogen:N helium:He iron:Fe gold:Au silver:Ag copper:Cu sodium:Na potassium:K
calcium:Ca zinc:Zn tin:Sn mercury:Hg magnesium:Mg aluminum:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl
iodine:I nickel:Ni uranium:U neon:Ne argon:Ar
"""
PEOPLE = """
Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tina Victor Wendy
Zoe Alice Bob Carol Daniel Ella Fred Gina Hugo Irene James Karen Luke Martha Nick Olga Peter Ruth Simon
"""
CITIES = "Paris London Rome Berlin Madrid Boston Chicago Tokyo Dublin Vienna Lima Cairo Oslo"
JOBS = "teacher doctor baker farmer nurse lawyer pilot painter driver cook dentist"
MEALS = "rice soup pizza bread fish pasta salad eggs chicken"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
THINGS = """
bike boat tent piano coat ring truck kite sled drum violin desk laptop scarf phone lamp ball clock cup spoon
ladder camera guitar basket blanket bucket candle mirror pillow radio towel umbrella wallet hammer helmet
kettle
"""
PLACES = "kitchen garden bedroom garage office school library attic drawer car"
OWNERS = "Adam Julia Eric Laura Mark Sarah Tom"


class Family(NamedTuple):
    """One kind of question about the rows (entity, column 1, column 2, ...) of a table."""

    name: str
    table: str
    question: str
    column: int


FAMILIES = (
    Family("opposite", "opposites", 'What is the opposite of "{entity}"?', 1),
    Family("continent", "countries", "On which continent is {entity}?", 1),
    Family("nationality", "countries", "What is the nationality of a person from {entity}?", 2),
    Family("plural", "plurals", 'What is the plural of "{entity}"?', 1),
    Family("adverb", "adverbs", 'What is the adverb of "{entity}"?', 1),
    Family("agent", "agents", "What do you call a person who {entity}?", 1),
    Family("symbol", "symbols", "What is the chemical symbol for {entity}?", 1),
    Family("city", "people", "{entity} lives in {answer}. Where does {entity} live?", 1),
    Family("job", "people", "{entity} works as a {answer}. What is the job of {entity}?", 2),
    Family("meal", "people", "{entity} eats {answer} for lunch. What does {entity} eat?", 3),
    Family("day", "people", "{entity} arrives on {answer}. On which day does {entity} arrive?", 4),
    Family("place", "things", "The {entity} is in the {answer}. Where is the {entity}?", 1),
    Family("owner", "things", "The {entity} belongs to {answer}. Who owns the {entity}?", 2),
)
TEST_ENTITIES = {
    "opposites": 21,
    "countries": 23,
    "plurals": 22,
    "adverbs": 13,
    "agents": 10,
    "symbols": 9,
    "people": 15,
    "things": 14,
}


def split_rows(text: str, separator: str | None = None) -> list[tuple[str, ...]]:
    """`entity:column:column` entries, separated by white space or by `separator`, as tuples."""
    return [tuple(" ".join(entry.split()).split(":")) for entry in text.split(separator) if entry.strip()]


def with_values(entities: str, *columns: str) -> list[tuple[str, ...]]:
    """Give every entity one value of each column, going round each list of values.

    The lists have lengths without a common factor, so that two columns do not move together.
    """
    lists = [column.split() for column in columns]
    return [(entity, *(values[i % len(values)] for values in lists)) for i, entity in enumerate(entities.split())]


def tables() -> dict[str, list[tuple[str, ...]]]:
    """All tables by name; the first column is the entity, and no entity is in two tables or twice in one."""
    made = {
        "opposites": split_rows(OPPOSITES),
        "countries": split_rows(COUNTRIES, ","),
        "plurals": split_rows(PLURALS),
        "adverbs": split_rows(ADVERBS),
        "agents": split_rows(AGENTS),
        "symbols": split_rows(SYMBOLS),
        "people": with_values(PEOPLE, CITIES, JOBS, MEALS, DAYS),
        "things": with_values(THINGS, PLACES, OWNERS),
    }
    entities = [row[0] for rows in made.values() for row in rows]
    repeated = sorted({entity for entity in entities if entities.count(entity) > 1})
    if repeated:
        raise ValueError(f"an entity must stand in one table once, these do not: {repeated}")
    return made


def shuffle_key(text: str) -> str:
    """An order that looks random and is the same in every Python."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def split_entities(rows: list[tuple[str, ...]], num_test: int) -> dict[str, list[tuple[str, ...]]]:
    """The rows of one table as "train" and "test"."""
    ordered = sorted(rows, key=lambda row: shuffle_key(row[0]))
    return {"test": ordered[:num_test], "train": ordered[num_test:]}


def make_items(split: str) -> Iterator[dict[str, str]]:
    """The items of one split, family by family."""
    parts = {name: split_entities(rows, TEST_ENTITIES[name])[split] for name, rows in tables().items()}
    for family in FAMILIES:
        rows = [row for row in parts[family.table] if len(row) > family.column]
        for number, row in enumerate(rows):
            entity, answer = row[0], row[family.column]
            question = family.question.format(entity=entity, answer=answer)
            name = f"{split}-{family.name}-{number:03d}"
            yield {"id": name, "question": question, "answer": answer, "entity": entity, "family": family.name}


def render(split: str) -> str:
    """The JSONL file of one split; the families are mixed so that any slice of it is a fair sample."""
    items = sorted(make_items(split), key=lambda item: shuffle_key(item["id"]))
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def check(print_line: Callable[[str], None] = print) -> int:
    """The number of splits whose committed file is not what this script writes."""
    stale = 0
    for split in ("train", "test"):
        path = embedded_path(split)
        if not path.is_file() or path.read_bytes() != render(split).encode("utf-8"):
            print_line(f"{path} differs from what this script writes; run it without --check")
            stale += 1
    return stale


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the files, or check them and return 1 when one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file differs")
    if parser.parse_args(arguments).check:
        return 1 if check() else 0
    for split in ("train", "test"):
        text = render(split)
        write_text_atomic(embedded_path(split), text)
        print(f"{embedded_path(split)}: {text.count(chr(10))} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())
