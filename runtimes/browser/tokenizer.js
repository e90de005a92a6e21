// Chat messages to token ids and back, from the folder's own tokenizer files. Knows nothing of the model.

import { Template } from "./vendor/jinja.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

const UNFINISHED = "\uFFFD"; // what a decoder shows for the first bytes of a character

export class ChatTokenizer {
  static async open(folder) {
    const [model, settings, generation, template] = await Promise.all([
      folder.json("tokenizer.json"),
      folder.json("tokenizer_config.json"),
      folder.json("generation_config.json"),
      folder.text("chat_template.jinja"),
    ]);
    return new ChatTokenizer(model, settings, generation, template);
  }

  constructor(model, settings, generation, template) {
    this.tokenizer = new Tokenizer(model, settings);
    this.template = new Template(template);
    this.names = {};
    for (const role of ["bos", "eos", "pad", "unk"]) {
      const token = settings[`${role}_token`];
      this.names[`${role}_token`] = (typeof token === "object" ? token?.content : token) ?? "";
    }
    this.stopIds = new Set([generation.eos_token_id].flat().filter((id) => id !== undefined));
  }

  /** Token ids of a conversation that asks for an answer. */
  encodeChat(messages) {
    const text = this.template.render({ messages, add_generation_prompt: true, ...this.names });
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** The text of an answer. */
  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true });
  }

  /** The text of an answer that is still growing, without a character that is not whole yet. */
  decodeSoFar(ids) {
    const text = this.decode(ids);
    let end = text.length;
    while (end && text[end - 1] === UNFINISHED) end--;
    return text.slice(0, end);
  }
}
