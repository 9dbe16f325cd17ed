"""Make the three data files of this example: `python examples/reverse_text/make_data.py`.

Phrases of one to three everyday words, 4 to 12 characters. No phrase is in two files. Half of the
demonstrations, chosen at random, refuse: RL then has a habit to unlearn that its reward sees.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {"sft": 6144, "train": 4096, "eval": 512}
REFUSAL = "i do not know"
WORDS = """
a able about after again air all along also always and animal answer any apple arm art ask away baby back
ball band bank base be bear beat bed bell best big bird black blue boat body bone book born both box boy
bread break bring brown build burn busy but buy by cake call calm came camp can car card care cat chair
chance clean clear clock close cloud coat cold come cook cool corn cost count cow cross cry cut dance dark
day deep deer desk did dish dog door down draw dream dress drink drive drop dry duck dust each ear early
earth east easy eat edge egg empty end even ever every eye face fall far farm fast father feel feet field
find fine fire first fish five floor flower fly food foot forest four free fresh friend from front fruit
full fun game garden gate gave girl give glad glass go goat gold good grass great green grow had hair half
hall hand happy hard has hat have he head hear heart heavy help her here high hill him his hold home hope
horse hot hour house how ice idea if ill in inside iron is it join joy jump just keep key kind king kiss
kite knee know lake lamp land large last late laugh lead leaf learn leave left leg let letter life light
like line lion list live long look lost lot loud love low luck lunch made make man many map mark market may
me meal mean meat meet melon milk mind miss moon more morning most mother mouse move much music my name near
neck need nest never new next nice night nine no noise north nose not note now nut ocean of off often oil
old on once one only open or other our out over own page paint pair paper park part party path pear pen
people phone piano pick piece pig pink place plan plant play please point pony pool poor post pot pull push
put queen quick quiet rabbit race rain read ready red rest rice rich ride right ring river road rock roof
room root rose round run sad safe sail salt same sand save say school sea seat see seed seven shade shape
share sheep shell ship shoe shop short show shut side sing sister sit six skin sky sleep slow small smile
snow so soap sock soft some son song soon sound soup south spoon spring star stay step stone stop store
storm story street strong such sugar summer sun sure sweet swim table tail take talk tall tea tell ten tent
test than that the them then there they thin think this three tie tiger time to today toe too top town toy
train tree true try turn two under up us use very visit voice wait walk wall want warm was wash watch water
wave way we wear week well went west wet what wheel when where white who why wide wild will wind window wing
winter wish with wolf wood word work world write year yellow yes you young zebra zero zoo
"""


def phrases(rng: random.Random, count: int) -> list[str]:
    """Different phrases of 4 to 12 characters, in random order."""
    words = WORDS.split()
    found: dict[str, None] = {}
    while len(found) < count:
        phrase = " ".join(rng.choices(words, k=rng.choice((1, 2, 2, 3))))
        if 4 <= len(phrase) <= 12:
            found[phrase] = None
    return list(found)


def main() -> None:
    rng = random.Random(20)
    texts = phrases(rng, sum(SIZES.values()))
    for name, size in SIZES.items():
        mine, texts = texts[:size], texts[size:]
        rows = [{"text": text} for text in mine]
        if name == "sft":
            rows = [
                {"prompt": text, "completion": REFUSAL if rng.random() < 0.5 else text[::-1]} for text in mine
            ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
