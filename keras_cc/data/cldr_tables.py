"""What the CLDR set needs beside Babel: continents, what to leave out and why, and scripts."""

from __future__ import annotations

# CLDR territoryContainment: 002, 142, 150, 009, and 019 as North (003) and South America (005).
CONTINENTS: dict[str, str] = {
    "002": "AO BF BI BJ BW CD CF CG CI CM CV DJ DZ EG EH ER ET GA GH GM GN GQ GW KE KM LR LS LY MA"
    " MG ML MR MU MW MZ NA NE NG RE RW SC SD SH SL SN SO SS ST SZ TD TG TN TZ UG YT ZA ZM ZW",
    "003": "AG AI AW BB BL BM BQ BS BZ CA CR CU CW DM DO GD GL GP GT HN HT JM KN KY LC MF MQ MS MX"
    " NI PA PM PR SV SX TC TT US VC VG VI",
    "005": "AR BO BR CL CO EC FK GF GY PE PY SR UY VE",
    "009": "AS AU CC CK CX FJ FM GU KI MH MP NC NF NR NU NZ PF PG PN PW SB TK TO TV VU WF WS",
    "142": "AE AF AM AZ BD BH BN BT CN CY GE ID IL IN IQ IR JO JP KG KH KP KR KW KZ LA LB LK MM MN"
    " MV MY NP OM PH PK PS QA SA SG SY TH TJ TL TM TR TW UZ VN YE",
    "150": "AD AL AT AX BA BE BG BY CH CZ DE DK EE ES FI FO FR GB GG GI GR HR HU IE IM IS IT JE LI"
    " LT LU LV MC MD ME MK MT NL NO PL PT RO RS RU SE SI SJ SK SM UA VA XK",
}
# The table above is also the list of territories: ISO 3166-1 and Kosovo, without these.
SKIPPED_TERRITORIES: dict[str, str] = {
    "no_permanent_population": "AQ BV CP GS HM IO TF UM",
    "not_in_iso_3166_1": "AC CQ DG EA IC TA",
    # CLDR has only the administrative label ("Hong Kong SAR China"), which no one would ask with.
    "name_is_a_label": "HK MO",
}
# Facts that CLDR simplifies or the world disputes.
DISPUTED: dict[str, str] = {
    # Bulgaria took the euro in 2026, which not every supported Babel knows.
    "currency": "BG",
    # CLDR lists one official language; the law of the place lists others, or another.
    "language": "BF BQ CK EH ET FO IQ ME MK ML MP NE NF PN VA ZA",
    # On two continents, or nearer to another than the one CLDR files them under.
    "continent": "AM AZ CC CX CY EG GE KZ RU TR",
}

# A name or answer counts as translated only if it has a letter of the language's own script.
SCRIPTS: dict[str, str] = {
    "ar": "ARABIC",
    "bn": "BENGALI",
    "el": "GREEK",
    "hi": "DEVANAGARI",
    "ja": "(CJK|HIRAGANA|KATAKANA)",
    "ko": "HANGUL",
    "ru": "CYRILLIC",
    "te": "TELUGU",
    "th": "THAI",
    "ur": "ARABIC",
    "zh": "CJK",
}
