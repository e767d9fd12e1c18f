"""What every CLIP of OpenAI's kind expects of images and texts (github.com/openai/CLIP)."""

# Of the red, green and blue values, scaled to 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VOCABULARY = 49408
START, END = 49406, 49407  # token ids before and after a text
