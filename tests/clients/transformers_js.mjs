// transformers.js opens an exported folder as it is, but for being told that the model is not in onnx/.
//
//   node transformers_js.mjs FOLDER QUESTION

import { basename, dirname } from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, question] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const generate = await pipeline("text-generation", basename(folder), { subfolder: "", device: "cpu" });
const messages = [{ role: "user", content: question }];
const prompt = generate.tokenizer.apply_chat_template(messages, {
  add_generation_prompt: true,
  return_dict: true,
});
const tokens = await generate.model.generate({ ...prompt, max_new_tokens: 200, do_sample: false });
const [{ generated_text }] = await generate(messages, { max_new_tokens: 200, do_sample: false });
console.log(
  JSON.stringify({
    prompt: prompt.input_ids.tolist()[0].map(Number),
    answer: tokens.tolist()[0].slice(prompt.input_ids.dims[1]).map(Number),
    text: generated_text.at(-1).content,
  }),
);
