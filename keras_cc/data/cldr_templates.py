"""One question a language and relation.

`{name}` is CLDR's name as it stands; the other keys are forms of it and verbs that agree with it,
from `cldr_grammar.py`. Russian, Greek and Basque ask about "the following country or territory"
and give the name after a colon, because its case does not follow from its spelling.
"""

from __future__ import annotations

from keras_cc.data.cldr_grammar import name_forms

RELATIONS: tuple[str, ...] = ("currency", "language", "continent")
#: Relations that are there when they are asked for by name: the same answer in every language.
BY_NAME: tuple[str, ...] = ("currency_code", "calling_code")

TEMPLATES: dict[str, dict[str, str]] = {
    "ar": {
        "currency": "ما هي عملة {name}؟",
        "currency_code": "ما هو رمز عملة {name}؟",
        "calling_code": "ما هو رمز هاتف {name} الدولي؟",
        "language": "ما هي اللغة الرسمية في {name}؟",
        # "Which continent includes ...": no verb has to agree with the name's gender.
        "continent": "ما هي القارة التي تضم {name}؟",
    },
    "bn": {
        "currency": "{genitive} মুদ্রা কী?",
        "currency_code": "{genitive} মুদ্রার কোড কী?",
        "calling_code": "{genitive} আন্তর্জাতিক কলিং কোড কী?",
        "language": "{genitive} সরকারি ভাষা কী?",
        "continent": "{name} কোন মহাদেশে অবস্থিত?",
    },
    "de": {
        "currency": "Welche Währung {hat} {the}?",
        "currency_code": "Welchen Währungscode {hat} {the}?",
        "calling_code": "Welche internationale Vorwahl {hat} {the}?",
        "language": "Welche Amtssprache {hat} {the}?",
        "continent": "Auf welchem Kontinent {liegt} {the}?",
    },
    "el": {
        "currency": "Ποιο είναι το νόμισμα της ακόλουθης χώρας ή περιοχής: {name};",
        "currency_code": "Ποιος είναι ο κωδικός νομίσματος της ακόλουθης χώρας ή περιοχής: {name};",
        "calling_code": "Ποιος είναι ο τηλεφωνικός κωδικός της ακόλουθης χώρας ή περιοχής: {name};",
        "language": "Ποια είναι η επίσημη γλώσσα της ακόλουθης χώρας ή περιοχής: {name};",
        "continent": "Σε ποια ήπειρο βρίσκεται η ακόλουθη χώρα ή περιοχή: {name};",
    },
    "en": {
        "currency": "What is the currency of {the}?",
        "currency_code": "What is the currency code of {the}?",
        "calling_code": "What is the calling code of {the}?",
        "language": "What is the official language of {the}?",
        "continent": "On which continent {is} {the} located?",
    },
    "es": {
        "currency": "¿Cuál es la moneda {of}?",
        "currency_code": "¿Cuál es el código de la moneda {of}?",
        "calling_code": "¿Cuál es el prefijo telefónico internacional {of}?",
        "language": "¿Cuál es el idioma oficial {of}?",
        "continent": "¿En qué continente {está} {the}?",
    },
    "eu": {
        "currency": "Zein da herrialde edo lurralde honetako moneta: {name}?",
        "currency_code": "Zein da herrialde edo lurralde honetako moneta-kodea: {name}?",
        "calling_code": "Zein da herrialde edo lurralde honetako telefono-kodea: {name}?",
        "language": "Zein da herrialde edo lurralde honetako hizkuntza ofiziala: {name}?",
        "continent": "Zein kontinentetan dago herrialde edo lurralde hau: {name}?",
    },
    "fr": {  # a no-break space before the question mark, as French sets it
        "currency": "Quelle est la monnaie {of}\u00a0?",
        "currency_code": "Quel est le code de la monnaie {of}\u00a0?",
        "calling_code": "Quel est l'indicatif téléphonique {of}\u00a0?",
        "language": "Quelle est la langue officielle {of}\u00a0?",
        "continent": "Sur quel continent se {trouve} {the}\u00a0?",
    },
    "hi": {
        "currency": "{name} की मुद्रा क्या है?",
        "currency_code": "{name} की मुद्रा का कोड क्या है?",
        "calling_code": "{name} का अंतरराष्ट्रीय कॉलिंग कोड क्या है?",
        "language": "{name} की आधिकारिक भाषा क्या है?",
        "continent": "{name} किस महाद्वीप में स्थित है?",
    },
    "id": {
        "currency": "Apa mata uang {name}?",
        "currency_code": "Apa kode mata uang {name}?",
        "calling_code": "Apa kode telepon internasional {name}?",
        "language": "Apa bahasa resmi {name}?",
        "continent": "{name} terletak di benua apa?",
    },
    "ja": {
        "currency": "{name}の通貨は何ですか？",
        "currency_code": "{name}の通貨コードは何ですか？",
        "calling_code": "{name}の国際電話の国番号は何ですか？",
        "language": "{name}の公用語は何ですか？",
        # 大陸 alone would leave Oceania out.
        "continent": "{name}はどの大陸・地域に属していますか？",
    },
    "ko": {
        "currency": "{name}의 통화는 무엇인가요?",
        "currency_code": "{name}의 통화 코드는 무엇인가요?",
        "calling_code": "{name}의 국제전화 국가 번호는 무엇인가요?",
        "language": "{name}의 공용어는 무엇인가요?",
        "continent": "{topic} 어느 대륙에 있나요?",
    },
    "pt": {
        "currency": "Qual é a moeda {of}?",
        "currency_code": "Qual é o código da moeda {of}?",
        "calling_code": "Qual é o código telefônico internacional {of}?",
        "language": "Qual é a língua oficial {of}?",
        "continent": "Em que continente {fica} {the}?",
    },
    "ru": {
        "currency": "Как называется валюта следующей страны или территории: {name}?",
        "currency_code": "Какой код валюты у следующей страны или территории: {name}?",
        "calling_code": "Какой телефонный код у следующей страны или территории: {name}?",
        "language": "Какой официальный язык у следующей страны или территории: {name}?",
        # "Часть света" counts Oceania, which "континент" does not.
        "continent": "В какой части света находится следующая страна или территория: {name}?",
    },
    "sw": {
        "currency": "Sarafu ya {name} ni ipi?",
        "currency_code": "Msimbo wa sarafu ya {name} ni upi?",
        "calling_code": "Msimbo wa simu wa kimataifa wa {name} ni upi?",
        "language": "Lugha rasmi ya {name} ni ipi?",
        # "... is part of which continent": `ni` has no noun class to agree with.
        "continent": "{name} ni sehemu ya bara gani?",
    },
    "te": {
        "currency": "{oblique} యొక్క కరెన్సీ ఏమిటి?",
        "currency_code": "{oblique} యొక్క కరెన్సీ కోడ్ ఏమిటి?",
        "calling_code": "{oblique} యొక్క అంతర్జాతీయ కాలింగ్ కోడ్ ఏమిటి?",
        "language": "{oblique} యొక్క అధికారిక భాష ఏమిటి?",
        "continent": "{name} ఏ ఖండంలో {ఉంది}?",
    },
    "th": {  # Thai sets no question mark
        "currency": "สกุลเงินของ{name}คืออะไร",
        "currency_code": "รหัสสกุลเงินของ{name}คืออะไร",
        "calling_code": "รหัสโทรศัพท์ระหว่างประเทศของ{name}คืออะไร",
        "language": "ภาษาราชการของ{name}คือภาษาอะไร",
        "continent": "{name}ตั้งอยู่ในทวีปใด",
    },
    "tr": {
        "currency": "{genitive} para birimi nedir?",
        "currency_code": "{genitive} para birimi kodu nedir?",
        "calling_code": "{genitive} uluslararası telefon kodu nedir?",
        "language": "{genitive} resmî dili nedir?",
        "continent": "{name} hangi kıtada yer alır?",
    },
    "ur": {
        "currency": "{oblique} کی کرنسی کیا ہے؟",
        "currency_code": "{oblique} کی کرنسی کا کوڈ کیا ہے؟",
        "calling_code": "{oblique} کا بین الاقوامی کالنگ کوڈ کیا ہے؟",
        "language": "{oblique} کی سرکاری زبان کیا ہے؟",
        "continent": "{oblique} کا تعلق کس براعظم سے ہے؟",
    },
    "vi": {
        "currency": "Đơn vị tiền tệ của {name} là gì?",
        "currency_code": "Mã tiền tệ của {name} là gì?",
        "calling_code": "Mã điện thoại quốc tế của {name} là gì?",
        "language": "Ngôn ngữ chính thức của {name} là gì?",
        "continent": "{name} nằm ở châu lục nào?",
    },
    "yo": {
        "currency": "Kí ni owó tí wọ́n ń ná ní {name}?",
        "currency_code": "Kí ni kóòdù owó tí wọ́n ń ná ní {name}?",
        "calling_code": "Kí ni kóòdù ìpè fóònù ti {name}?",
        "language": "Èdè wo ni èdè ìjọba ní {name}?",
        "continent": "Inú kọ́ńtínẹ́ǹtì wo ni {name} wà?",
    },
    "zh": {
        "currency": "{name}的货币是什么？",
        "currency_code": "{name}的货币代码是什么？",
        "calling_code": "{name}的国际电话区号是什么？",
        "language": "{name}的官方语言是什么？",
        "continent": "{name}位于哪个大洲？",
    },
}

# Accepted beside CLDR's bare language name, which these languages rarely use alone.
LANGUAGE_ANSWER_VARIANTS: dict[str, str] = {
    "ar": "اللغة {answer}",
    "id": "bahasa {answer}",
    "th": "ภาษา{answer}",
}


def question(lang: str, relation: str, code: str, name: str) -> str:
    """Writes one question.

    Args:
        lang: ISO 639-1 code of a language in `TEMPLATES`.
        relation: one of `RELATIONS` or `BY_NAME`.
        code: ISO 3166 code of the territory, for its articles.
        name: the territory's name in `lang`.

    Returns:
        The question, ending in the language's own question mark (Thai has none).

    Example:

    ```python
    question("tr", "currency", "KE", "Kenya")  # "Kenya'nın para birimi nedir?"
    ```
    """
    return TEMPLATES[lang][relation].format(**name_forms(lang, code, name))
