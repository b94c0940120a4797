"""What harmful requests are about, by the words in them, and what can be offered in place of each."""

import functools
import re
from typing import NamedTuple


class Topic(NamedTuple):
    """words: beginnings of the words that tell of it, by comma; one with `!` is a whole word. refused: what
    is not given. offered: what is, one or the other."""

    words: str
    refused: str
    offered: tuple[str, str]


# Of those a request speaks of most, the first counts; but whoever may come to harm at once stands before all.
URGENT = (
    Topic(
        "suicid, self-harm, self harm, kill myself, kill yourself, kill themsel, end my life, take their "
        "own life, anorexi, starve myself, eating disorder, pro-ana",
        "anything that could lead to self-harm",
        (
            "how to talk with someone who is struggling, and how to reach a crisis line",
            "where to find support at once, and small steps that help through a hard day",
        ),
    ),
    Topic(
        "child porn, child abuse, child exploit, child sex, abuse a child, molest, underage, pedophil, "
        "groom a child, groom a minor, groom other, trafficking, a minor and",
        "anything that exploits people or children",
        (
            "how such exploitation is recognised, and where it can be reported",
            "how families and schools protect children, and which hotlines there are",
        ),
    ),
)
OTHERS = (
    Topic(
        "bomb, explosives, explosive device, weapon, firearm, gun!, guns!, ammunition, grenade, poison, "
        "nerve agent, chemical agent, terroris, radicali, massacre, mass shoot, arson, on fire, start a "
        "fire, sabotag",
        "making or using weapons",
        (
            "the laws and the history behind it, and how communities prevent violence",
            "how to stay safe, and to whom a threat is reported",
        ),
    ),
    Topic(
        "hack, malware, ransomware, virus, trojan, keylog, phish, backdoor, ddos, botnet, brute forc, "
        "brute-forc, spyware, password, unauthorized access, unauthorised access, bypass, crack, hijack, "
        "webcam, cyberat, login, spam, infiltrat, breach, surveil, wiretap, intercept, exploit",
        "getting into systems or data of others",
        (
            "how to protect accounts and systems, and how weaknesses are reported responsibly",
            "how to practise security lawfully, on a machine of your own or in a training range",
        ),
    ),
    Topic(
        "launder, fraud, scam, rob!, robb, burglar, counterfeit, forge, embezzl, insider trad, evade "
        "tax, tax evasion, ponzi, pyramid scheme, credit card, identity theft, steal, shoplift, theft, "
        "brib, extort, smuggl, fake id, fake invoice, fake review, fake document, fake check, pirat, "
        "plagiari, cheat",
        "fraud, theft or forgery",
        (
            "how such schemes are recognised, and how to protect yourself and others from them",
            "a lawful way to the money or the papers that are needed",
        ),
    ),
    Topic(
        "cocaine, heroin, meth!, methamph, fentanyl, lsd!, opioid, drug, narcotic, overdos, addict, "
        "steroid, prescription, medication, underage drinking, alcohol",
        "making, getting or misusing drugs",
        (
            "what is known of the risks, and where help with substances is found",
            "how to talk with a doctor or a counsellor about it",
        ),
    ),
    Topic(
        "home address, phone number, contact details, personal information, personal data, personal "
        "details, private information, private details, private data, private message, confidential, "
        "classified, social security, medical record, medical histor, dox, stalk, location, leak, "
        "eavesdrop, spy!, spies!, secret, whereabouts, identity of, psychiatric, internal communication, "
        "driving license",
        "private or confidential facts about people",
        (
            "what is public by law, and how such records may be asked for properly",
            "how to protect private facts, and whom to ask when they were misused",
        ),
    ),
    Topic(
        "bully, bullies, cyberbull, harass, threat, intimidat, humiliat, revenge, manipulat, gasligh, "
        "coerc, abus, blackmail, troll, ridicul, shame, belittl",
        "hurting or pressing another person",
        (
            "how to settle such a quarrel, or how to set limits without harm",
            "a firm and fair message that says what you need",
        ),
    ),
    Topic(
        "racis, racial, sexis, homophob, transphob, xenophob, antisemit, islamophob, bigot, slur, "
        "supremac, stereotyp, hate, hating, inferior, superior race, ethnic, immigrant, refugee, muslim, "
        "jew!, jews!, jewish, african, black people, gay!, lesbian, lgbt, transgender, gender, "
        "disabilit, disabled, crippled, religio, women, woman, female, older people, old people, "
        "elderly, poor people, low income, public housing, homeless, lazy, laziness, thug, makes fun, "
        "pregnan, discriminat, minorit, offensive, derogatory, demean, degrad, mock, insult, curse, "
        "swear, profan, toxic, vulgar, disgust",
        "words that demean people for who they are",
        (
            "a text that shows such people fairly, or what research says about this prejudice",
            "how to answer such talk, and how a team or a class can speak about it with respect",
        ),
    ),
    Topic(
        "sex, porn, erotic, nude, naked, intimate, fetish, seduc, prostitut, escort, affair, explicit, "
        "lewd, genital, breast, hypnoti, adult-themed",
        "explicit content of this kind",
        (
            "the story without the explicit part, with the feelings and the tension kept",
            "honest information on consent, health or relationships",
        ),
    ),
    Topic(
        "fake news, fake social, misinform, disinform, conspirac, propagand, hoax, rumor, rumour, "
        "gossip, false, mislead, deceiv, deceptive, incorrect, pseudoscien, election, vote, voting, "
        "politic, candidate, president, vaccin, government, climate, rigged, defam, slander, libel, "
        "lie!, lies!, lied!, lying, untrue, fabricat, deepfake, impersonat, divert attention, cover up, "
        "downplay",
        "text that misleads people",
        (
            "what the evidence says, with sources that can be checked",
            "an honest text on the same subject that lets readers judge for themselves",
        ),
    ),
    Topic(
        "copyright, lyrics, entire, full script, complete script, full text, all the dialogue, download, "
        "torrent, paywall, chapter, verbatim, word for word, from the book, novel by",
        "a whole work that belongs to others",
        (
            "a summary of it in my own words, and where it can be had lawfully",
            "what its themes are, with a short quotation or two",
        ),
    ),
    Topic(
        "kill, murder, attack, assault, hurt, harm, tortur, violen, fight, beat, stab, shoot, shot, "
        "kidnap, hostage, blood, gore!, gruesome, cruel, brutal, rape, strangl, burn, destroy, dead, "
        "death, die!, injur, crash, danger, speeding, drunk, reckless, leave him alone",
        "anything that could get someone hurt",
        (
            "how to calm the situation, and whom to call when someone is in danger",
            "the scene or the subject without instructions that could do harm",
        ),
    ),
    Topic(
        "medical, diagnos, treatment, cure, disease, cancer, symptom, dosage, dose, legal advice, "
        "lawsuit, invest, stock, financ, tax, loan, gambl, bet!, betting",
        "advice that could cost someone health or money",
        (
            "what is generally known about it, and what to ask a professional",
            "how to find a doctor, a lawyer or an adviser, and how to prepare for the talk",
        ),
    ),
    Topic(
        "illegal, unlawful, crime, criminal, evad, escap, without getting caught, evidence, witness, "
        "prohibit, banned, sell her, sell him",
        "breaking the law",
        (
            "what the law says about it, and a lawful way to what is needed",
            "whom to ask for advice on it: a lawyer, an office or a counsellor",
        ),
    ),
)


def topic_of(request: str) -> Topic | None:
    """What a harmful request is about; None where its words tell nothing."""
    for topic in URGENT:
        if _spoken(topic, request):
            return topic
    most = max(OTHERS, key=lambda topic: _spoken(topic, request))
    return most if _spoken(most, request) else None


def _spoken(topic: Topic, request: str) -> int:
    return len(_pattern(topic.words).findall(request))


@functools.cache
def _pattern(words: str) -> re.Pattern[str]:
    """Any of the words, at its beginning."""
    known = (
        re.escape(word.removesuffix("!")) + (r"\b" if word.endswith("!") else "")
        for word in words.split(", ")
    )
    return re.compile(rf"\b(?:{'|'.join(known)})", re.IGNORECASE)
