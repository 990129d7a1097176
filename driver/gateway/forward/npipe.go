package forward

import (
	"fmt"
	"net/url"
	"strings"
)

// pipePath is the name of a pipe as Windows has it, \\.\pipe\NAME, from its URL, npipe:////./pipe/NAME, or from the name itself.
func pipePath(local string) (string, error) {
	path := strings.ReplaceAll(local, `\`, "/")
	if strings.Contains(path, "://") {
		u, err := url.Parse(path)
		if err != nil {
			return "", err
		}
		if u.Scheme != "npipe" || u.Host != "" || u.RawQuery != "" || u.Fragment != "" {
			return "", fmt.Errorf("listen npipe %s: want npipe:////./pipe/NAME", local)
		}
		path = u.Path
	}
	name, ok := strings.CutPrefix(path, "//./pipe/")
	if !ok || name == "" || strings.ContainsAny(name, "/\x00") || len(name) > 240 {
		return "", fmt.Errorf("listen npipe %s: want npipe:////./pipe/NAME", local)
	}
	return `\\.\pipe\` + name, nil
}
