// The request as a command of a POSIX shell.

/**
 * @param {string} url
 * @param {[string, string][]} fields
 * @param {[string, string][]} files modality → file name
 * @param {{key: boolean, out: string}} how whether a key is sent; where the answer goes
 */
export function curlOf(url, fields, files, { key, out }) {
  const parts = [
    ...(key ? ['-H "Authorization: Bearer $MM_API_KEY"'] : []),
    ...files.map(([name, file]) => `-F ${quoted(`${name}=@${inForm(file)}`)}`),
    ...fields.map(([name, value]) => `-F ${quoted(`${name}=${value}`)}`),
    `-o ${quoted(out)}`,
    quoted(url),
  ];
  return `curl ${parts.join(" \\\n     ")}`;
}

/** A name as -F takes it: "," and ";" end one, unless it stands in quotes. */
function inForm(name) {
  return /[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;
}

function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
