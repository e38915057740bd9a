"""One question a language and relation about a person who was invented.

`{name}` is a name in Latin script that begins with a consonant and ends in a vowel. No question
says whether the person is a man or a woman: where a verb would, a noun stands in its place
("the year of birth", "the language"). Russian, Greek and Basque ask about "the person by the name
of" or "the following person", because the name takes no case. Each asks for what the answer is:
the language's name as CLDR gives it, and a year of the common era where another one is in use.
"""

RELATIONS: tuple[str, ...] = ("born", "town", "speaks")

TEMPLATES: dict[str, dict[str, str]] = {
    "ar": {
        "born": "ما هي سنة ميلاد {name}؟",
        "town": "ما هي مدينة إقامة {name}؟",
        "speaks": "ما هي لغة {name}؟",
    },
    "bn": {
        "born": "{name}-এর জন্ম কোন সালে?",
        "town": "{name} কোন শহরে থাকেন?",
        "speaks": "{name}-এর মাতৃভাষা কী?",
    },
    "de": {
        "born": "In welchem Jahr wurde {name} geboren?",
        "town": "In welcher Stadt wohnt {name}?",
        "speaks": "Welche Sprache spricht {name}?",
    },
    "el": {
        "born": "Ποιο έτος γεννήθηκε το εξής πρόσωπο: {name};",
        "town": "Σε ποια πόλη μένει το εξής πρόσωπο: {name};",
        "speaks": "Ποια γλώσσα μιλάει το εξής πρόσωπο: {name};",
    },
    "en": {
        "born": "In which year was {name} born?",
        "town": "In which town does {name} live?",
        "speaks": "Which language does {name} speak?",
    },
    "es": {
        "born": "¿En qué año nació {name}?",
        "town": "¿En qué ciudad vive {name}?",
        "speaks": "¿Qué idioma habla {name}?",
    },
    "eu": {
        "born": "Zein urtetan jaio zen pertsona hau: {name}?",
        "town": "Zein herritan bizi da pertsona hau: {name}?",
        "speaks": "Zein da pertsona honen hizkuntza: {name}?",
    },
    "fr": {  # a no-break space before the question mark, as French sets it
        "born": "Quelle est l’année de naissance de {name}\u00a0?",
        "town": "Dans quelle ville habite {name}\u00a0?",
        "speaks": "Quelle langue parle {name}\u00a0?",
    },
    "hi": {
        "born": "{name} का जन्म किस वर्ष हुआ था?",
        "town": "{name} का निवास किस शहर में है?",
        "speaks": "{name} की भाषा क्या है?",
    },
    "id": {
        "born": "{name} lahir pada tahun berapa?",
        "town": "{name} tinggal di kota apa?",
        "speaks": "{name} berbicara bahasa apa?",
    },
    "ja": {
        "born": "{name}の生年は西暦何年ですか？",
        "town": "{name}はどの町に住んでいますか？",
        "speaks": "{name}は何語を話しますか？",
    },
    "ko": {
        "born": "{name}의 출생 연도는 언제인가요?",
        "town": "{name}의 거주 도시는 어디인가요?",
        "speaks": "{name}의 언어는 무엇인가요?",
    },
    "pt": {
        "born": "Em que ano nasceu {name}?",
        "town": "Em que cidade mora {name}?",
        "speaks": "Que língua fala {name}?",
    },
    "ru": {
        "born": "В каком году родился человек по имени {name}?",
        "town": "В каком городе живёт человек по имени {name}?",
        # "Which language does ... know": the answer stands in CLDR's own case.
        "speaks": "Какой язык знает человек по имени {name}?",
    },
    "sw": {
        "born": "{name} alizaliwa mwaka gani?",
        "town": "{name} anaishi mji gani?",
        "speaks": "{name} anazungumza lugha gani?",
    },
    "te": {
        "born": "{name} ఏ సంవత్సరంలో జన్మించారు?",
        "town": "{name} ఏ పట్టణంలో నివసిస్తున్నారు?",
        "speaks": "{name} ఏ భాష మాట్లాడతారు?",
    },
    "th": {  # Thai sets no question mark, and counts its years from another one
        "born": "{name} เกิดปี ค.ศ. อะไร",
        "town": "{name} อาศัยอยู่ในเมืองอะไร",
        "speaks": "{name} พูดภาษาอะไร",
    },
    "tr": {
        "born": "{name} hangi yılda doğdu?",
        "town": "{name} hangi şehirde yaşıyor?",
        "speaks": "{name} hangi dili konuşuyor?",
    },
    "ur": {
        "born": "{name} کی پیدائش کس سال ہوئی؟",
        "town": "{name} کی رہائش کس شہر میں ہے؟",
        "speaks": "{name} کی زبان کیا ہے؟",
    },
    "vi": {
        "born": "{name} sinh năm nào?",
        "town": "{name} sống ở thành phố nào?",
        "speaks": "{name} nói ngôn ngữ nào?",
    },
    "yo": {
        "born": "Ọdún wo ni wọ́n bí {name}?",
        "town": "Ìlú wo ni {name} ń gbé?",
        "speaks": "Èdè wo ni {name} ń sọ?",
    },
    "zh": {
        "born": "{name}出生于哪一年？",
        "town": "{name}住在哪座城市？",
        "speaks": "{name}说什么语言？",
    },
}
