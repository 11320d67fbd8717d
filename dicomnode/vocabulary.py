"""What the words of a description mean: phrases in several languages → names, the longest phrase first.

Law: pure. Texts are split into tokens, so that `ABD_ART_3mm`, `VEN_70s` and `Art30s` fall right where regular
expressions with word borders do not; accents do not matter. A phrase that a site gives to a name of its own loses
every meaning it had here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from unicodedata import combining, normalize

Phrase = tuple[str, ...]

_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|\d+")
_SIGNS = (
    (re.compile(r"(?:(?<=\w\w)|(?<!\w))[+＋]\s?c\b|\bc\s?[+＋](?!\w)", re.IGNORECASE), " contrast "),
    (re.compile(r"(?<![\w-])[-−]\s?c\b(?!-)|\bc[-−](?![\w-])", re.IGNORECASE), " noncontrast "),
)
"""`+C`, `C+`, `-C` and `C-` carry their meaning in a sign, which is no token."""


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers: split at anything but letters and digits, and between letters and digits.

    `ABD_ART_3mm` → abd, art, 3, mm. Chinese characters, which stand without spaces, are tokens of their own.
    """
    return _TOKEN.findall(text.lower())


class Vocabulary:
    """Names and the phrases that stand for them.

    Parameters
    ----------
    site
        Phrases of the site by name: they are added to a name that is known, and taken from every other name.
    """

    def __init__(self, site: Mapping[str, Iterable[str]] | None = None) -> None:
        added = {name: [each for text in texts for each in _spellings(text)] for name, texts in (site or {}).items()}
        taken = {phrase for phrases in added.values() for phrase in phrases}
        self._names: dict[Phrase, set[str]] = {}
        for name, phrases in _BUILT_IN.items():
            for phrase in phrases - taken:
                self._names.setdefault(phrase, set()).add(name)
        for name, several in added.items():
            for phrase in several:
                self._names.setdefault(phrase, set()).add(name)
        self.names = frozenset(_BUILT_IN) | frozenset(added)
        self._longest = max(len(phrase) for phrase in self._names)
        self._read: dict[str, dict[str, str]] = {}

    def read(self, text: str) -> dict[str, str]:
        """The names that a text speaks of, each with the phrase that says so, in the order of the text."""
        if text not in self._read:
            if len(self._read) >= _REMEMBERED:
                self._read.clear()
            self._read[text] = self._parse(text)
        return self._read[text]

    def _parse(self, text: str) -> dict[str, str]:
        for sign, word in _SIGNS:
            text = sign.sub(word, text)
        words, found, at = _phrase(text), dict[str, str](), 0
        while at < len(words):
            length = next((n for n in range(self._longest, 0, -1) if words[at : at + n] in self._names), 0)
            for name in sorted(self._names.get(words[at : at + length], ())):
                found.setdefault(name, " ".join(words[at : at + length]))
            at += max(length, 1)
        return found


_REMEMBERED = 10_000
"""Texts whose meaning is kept; hostile senders can make up any number."""


def _phrase(text: str) -> Phrase:
    """The tokens of a text without accents."""
    plain = "".join(c for c in normalize("NFKD", text) if not combining(c))
    return tuple(tokens(plain))


def _spellings(text: str) -> frozenset[Phrase]:
    """A phrase as it is read: umlauts are typed without their dots, or as two letters."""
    in_two_letters = normalize("NFC", text.lower()).translate(_UMLAUTS)
    return frozenset(phrase for each in (text, in_two_letters) if (phrase := _phrase(each)))


_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})


def _phrases(text: str) -> frozenset[Phrase]:
    return frozenset().union(*map(_spellings, text.split(",")))


# English, German, French, Spanish, Portuguese, Italian, Dutch, Scandinavian, Polish, Turkish, Chinese, Japanese.
_BUILT_IN: dict[str, frozenset[Phrase]] = {
    name: _phrases(text)
    for name, text in {
        # ── contrast agent ──
        "native": """
            calcium score, calcium scoring, casc, ca sc, ca score, cascore, smart score, kalk, kalkscore, calcium,
            native, nativ, nativo, nativa, natif, native phase, nativphase, nc, ncct, nect, nce, plain, unenhanced,
            unenh, pre, precontrast, pre contrast, pre con, pre gd, pre gad, pre gado, pre km, pre iv, non contrast,
            noncontrast, non con, noncon, non enhanced, nonenhanced, non enh, non ce, no contrast, no iv, no iv
            contrast, no c, without, without contrast, without iv, without iv contrast, w o, wo, w o contrast, wo
            contrast, w o c, wo c, w o con, wo con, w o iv, wo iv, w o iv contrast, wo iv contrast, w o gad, wo gad, w
            o gd, wo gd, ohne km, ohne kontrast, ohne kontrastmittel, ohne, vor km, vor kontrast, vor kontrastmittel,
            sans injection, sans inj, sans contraste, sans iv, sans pdc, sans produit de contraste, sans gado, non
            injecte, non injectee, avant injection, sin contraste, sin civ, sin cte, simple, fase simple,
            precontraste, pre contraste, sem contraste, pre contrastado, senza contrasto, senza mdc, senza, basale,
            diretta, zonder contrast, zonder, blanco, utan kontrast, uten kontrast, uden kontrast, bez kontrastu, bez
            srodka, kontrastsiz, 平扫, 平掃, 单纯, 単純""",
        "contrast": """
            cta, ct a, angio, angiography, angiographie, ctpa, cardiac cta, coronary cta, corocta, coro, contrast,
            contraste, contrasto, kontrast, kontrastmittel, enhanced, enh, ce, cect, post, postcontrast, post
            contrast, post con, post gd, post gad, post gado, post km, post iv, postc, with contrast, with iv, with iv
            contrast, w contrast, w iv, w iv contrast, w con, w c, with c, iv contrast, gd, gad, gado, gadolinium, km,
            mit km, mit kontrast, mit kontrastmittel, nach km, nach kontrast, avec injection, avec inj, avec
            contraste, avec gado, apres injection, injecte, injectee, injection, con contraste, con civ, contrastado,
            contrastada, com contraste, con contrasto, con mdc, mdc, met contrast, na contrast, med kontrast, efter
            kontrast, z kontrastem, po kontrascie, kontrastli, 增强, 增強, 造影""",
        "arterial": """
            art, arterial, arterial phase, arteriell, arterielle, arteriel, arterieel, arteriosa,
            arterioso, arterialphase, arterielle phase, artar, artarfas, tetnicza, late arterial, late art,
            late arterial phase, lat art, early arterial, early art, spätarteriell, spät arteriell,
            früharteriell, früh arteriell, arterielle tardive, arterial tardia, arteriosa tardiva,
            arterielle precoce, hap, hepatic arterial, art phase, artph, 20 s, 25 s, 30 s, 35 s, 40 s, 25
            sec, 30 sec, 35 sec, 40 sec, temps arteriel, fase arterial, fase arteriosa, 动脉期, 動脈期, 動脈相, 动脉""",
        "portal": """
            portal, portal venous, portalvenous, porto venous, portovenous, portale, porta, venös,
            portalvenös, portal venös, portavenös, portvenös, porto venosa, portovenosa, pv, pvp, pvph,
            ven, venous, venous phase, venosa, venoso, veineux, veineuse, veneus, venose, vena porta,
            hepatic venous, portal phase, pv phase, wrotna, zylna, temps portal, fase portal, fase portale,
            fase venosa, 60 s, 65 s, 70 s, 75 s, 80 s, 60 sec, 65 sec, 70 sec, 75 sec, 80 sec, 门脉期, 門脈相,
            門脈期, 静脉期, 静脈相""",
        "delayed": """
            delayed, delay, late, late phase, late venous, equilibrium, equilib, equil, equilibrio,
            equilibre, transitional, tardif, tardive, tardivo, tardiva, tardia, tardio, spät, spätphase,
            späte phase, spätvenös, laat, late fase, pozna, nephrographic, excretory, urographic, urogram,
            ausscheidung, excretion, excretora, escretoria, del, dly, 120 s, 150 s, 180 s, 240 s, 300 s,
            120 sec, 150 sec, 180 sec, 240 sec, 300 sec, 2 min, 3 min, 4 min, 5 min, 8 min, 10 min, 15 min,
            延迟期, 延遲期, 平衡相, 平衡期, 遅延相""",
        "hepatobiliary": """
            hepatobiliary, hepatobiliary phase, hbp, hb phase, hepatobiliar, hepatobiliaire, hepatobiliare,
            hepatobiliar phase, leberspezifisch, 20 min, 肝胆期, 肝細胞相, 肝胆特异期""",
        "mixed": """
            w wo, w wo contrast, wwo, w and wo, w and w o, with and without, with and without contrast, w w o, w w o
            contrast, w w o con, with without, with without contrast, without and with, without and with contrast, wo
            and w, w o and w, pre post, pre and post, pre post contrast, pre post gd, pre post gad, mit und ohne, ohne
            und mit, ohne mit, avec et sans, sans et avec, sans puis avec, con y sin, sin y con, con e senza, senza e
            con, sem e com, com e sem, met en zonder""",
        "other": """
            post op, post operative, postop, post surgery, post biopsy, post treatment, post therapy, post rt, post
            ablation, post tace, post processing, post proc, post void, post mortem, pre op, preop, pre treatment, pre
            biopsy, pre rt, pre ablation, pre tace, pre void, contrast tracker, contrast monitoring, ap supine, ap
            scout, delayed post op, bolus tracking, smart prep, premonitoring, monitoring, portal imaging, plain film,
            late onset""",
        # ── what it is an image of ──
        "localizer": """
            localizer, localiser, localizers, localisers, localizador, localizadores, localisateur, localizzatore,
            loc, lokalizer, lokalisator, scout, scouts, scanogram, topogram, topogramm, topogramma, topo, surview,
            scano, plan scan, 3 plane, 3 plane loc, three plane, 3 pl loc, reperage, uebersicht, ubersicht, survey,
            head scout, smartbrain, 定位, 定位像, 位置決め""",
        "dose_report": """
            dose report, dose reports, patient protocol, dose info, dose summary, dosisbericht, dosis, rapport de
            dose, informe de dosis, exam summary, radiation dose, dosisprotokoll, 剂量""",
        "screenshot": """
            screen save, screen saves, screensave, screen shot, screenshot, screen capture, screencapture, snapshot,
            key images, key image, capture, report, image report, results, secondary capture, evidence images""",
        "projection": """
            mip, mips, minip, min ip, mnip, average ip, mpr mip, projection, projections, radial mip, rotating mip,
            rot mip, vrt, vr, volume rendering""",
        "reformat": """
            mpr, mprs, mpr range, reformat, reformats, reformatted, reformation, rekonstruktion mpr, mpr cor, mpr sag,
            mpr tra, curved, cpr, dmpr""",
        "subtraction": """
            subtraction, subtractions, subtracted, sub, subs, substraction, subtraktion, subtr, sottrazione,
            sustraccion, soustraction, subtracao, digital subtraction, 减影""",
        "timing": """
            bolus tracking, bolus, bolus tracker, premonitoring, monitoring, monitor, smart prep, smartprep, sure
            start, surestart, test bolus, timing, timing bolus, locator, tracker, care bolus, carebolus,
            bolustracking, fluoro trigger""",
        "map": """
            adc, apparent diffusion coefficient, dadc, eadc, fa map, trace map, t 2 map, t 1 map, r 2, r 2 map, cbf,
            cbv, mtt, ttp, tmax, perf map, phase map, b 0 map, field map, fieldmap, fat fraction, fatfrac, iodine,
            iodine map, parametric map, pd map, ktrans""",
        # ── MR weighting ──
        "t1": """
            t 1, t 1 w, t 1 we, t 1 wi, t 1 weighted, t 1 gewichtet, mprage, mp rage, bravo, spgr, fspgr, ir fspgr,
            tfl, tfe, vibe, lava, thrive, e thrive, ethrive, flash, fl 3 d, t 1 vibe, t 1 tfe, 3 d t 1, mp 2 rage, tfl
            3 d, quick 3 d, star vibe, starvibe, gre t 1, ponderacion t 1, dyn vibe""",
        "t2": """
            t 2, t 2 w, t 2 wi, t 2 weighted, t 2 tse, t 2 fse, t 2 haste, haste, ssfse, ss fse, propeller t 2, blade
            t 2, t 2 blade, space t 2, t 2 space, cube t 2, t 2 cube, t 2 vista, frfse, t 2 frfse, t 2 propeller""",
        "flair": """
            flair, t 2 flair, flair t 2, t 2 dark fluid, t 2 darkfluid, tirm dark fluid, dark fluid, darkfluid, t 2
            space dark fluid, cube flair, cube t 2 flair, space flair, 3 d flair, flair 3 d, t 2 w flair, vista flair,
            t 2 tirm dark fluid""",
        "t1_flair": "t 1 flair, flair t 1, t 1 w flair",
        "dwi": """
            dwi, diffusion, diff, ep 2 d diff, resolve, trace, tracew, diffusionsgewichtet, difusion, diffusione, dti,
            b 50, b 400, b 500, b 800, b 1000, ivim""",
        "swi": "swi, swan, susceptibility, t 2 star, t 2 gre, gre t 2, hemo, venobold, swip, merge",
        "dce": """
            dce, dynamic, dyn, dynamik, dinamico, dynamique, twist, tricks, 4 d thrive, disco, perfusion, multiphase""",
        "opposed_phase": """
            opp, opposed, opposed phase, opposedphase, out of phase, out phase, outphase, oop, op phase, gegenphase""",
        "in_phase": "in phase, inphase",
        "fat": "fat, fat only, f only, fatonly",
        "water": "water, water only, w only, wateronly, wasser",
        # ── CT kernel words in descriptions ──
        "lung": "lung, lungs, lunge, pulmon, poumon, polmone, parenchym, pulmo",
        "bone": "bone, bones, knochen, osseux, hueso, osso, bony",
    }.items()
}

BUILT_IN = Vocabulary()
ENHANCED = frozenset({"contrast", "arterial", "portal", "delayed", "hepatobiliary"})
"""Names that tell of contrast agent given."""
CONTRAST_PHASES = ("native", "arterial", "portal", "delayed", "hepatobiliary")
