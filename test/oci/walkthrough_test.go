package oci_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
)

// step is a command of a page, and what it is to print, line by line.
type step struct {
	line    int
	command string
	prints  []string
}

// steps reads the indented parts of a page: a line that begins with # is a command, with its here-document if it has one, and
// what follows is what it prints. A line with … alone is any number of lines.
func steps(text string) []step {
	var all []step
	within := false // a here-document
	for i, line := range strings.Split(text, "\n") {
		code, ours := strings.CutPrefix(line, "    ")
		switch {
		case !ours:
			continue
		case within:
			all[len(all)-1].command += code + "\n"
			within = code != "EOF"
		case strings.HasPrefix(code, "# "):
			all = append(all, step{line: i + 1, command: code[2:] + "\n"})
			within = strings.Contains(code, "<<'EOF'")
		case len(all) > 0:
			all[len(all)-1].prints = append(all[len(all)-1].prints, code)
		}
	}
	return all
}

// pattern matches what the step is to print.
func (s step) pattern() *regexp.Regexp {
	var b strings.Builder
	for _, line := range s.prints {
		if line == "…" {
			b.WriteString(`(.*\n)*?`)
			continue
		}
		b.WriteString(strings.ReplaceAll(regexp.QuoteMeta(strings.TrimRight(line, " ")), "…", ".*") + ` *\n`)
	}
	return regexp.MustCompile(`^` + b.String() + `$`)
}

// page is held while the page's containers run: their cgroups are called after them, and the pretend hosts have one hierarchy.
var page sync.Mutex

// walkthrough does what doc/oci-walkthrough.md says, in one shell, and compares what is printed.
func walkthrough(r *rig) {
	page.Lock()
	defer page.Unlock()
	text, err := os.ReadFile("../../doc/oci-walkthrough.md")
	if err != nil {
		r.Fatal(err)
	}
	dir := filepath.Join(r.h.Dir, "walk")
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		r.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for name, script := range map[string]string{
		"runc": "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin exec " + strings.Join(r.command(), " ") + ` "$@"` + "\n",
		"wget": "#!/bin/sh\nexec busybox wget \"$@\"\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, "bin", name), []byte(script), 0o755); err != nil {
			r.Fatal(err)
		}
	}
	all := steps(strings.ReplaceAll(string(text), "/usr/bin/usernet", r.usernetBin()))
	if len(all) < 20 {
		r.Fatalf("the page has %d steps", len(all))
	}
	r.made = append(r.made, "web", "db", "side")
	var script strings.Builder
	fmt.Fprintf(&script, "cd %s; PATH=%s/bin:%s/bin:$PATH\n", dir, dir, r.h.Dir)
	for i, s := range all {
		// A server may take a moment until it listens; what was printed in vain until then does not count.
		if strings.Contains(s.command, "wget") {
			s.command = "for try in 1 2 3 4 5 6 7 8 9 10; do\n{ " + strings.TrimSpace(s.command) + "; } >try.log 2>&1 && break; sleep 0.2\ndone\ncat try.log\n"
		}
		fmt.Fprintf(&script, "echo '@@ %d'\n{\n%s} 2>&1 || echo '@@ failed'\n", i, s.command)
	}
	out, err := r.h.Run(r.Context(), "sh", "-c", script.String())
	if err != nil {
		r.Fatalf("%v; printed\n%s", errors.Unwrap(err), out)
	}
	for i, part := range strings.Split("\n"+out+"\n", "\n@@ ")[1:] {
		number, printed, _ := strings.Cut(part, "\n")
		if number != fmt.Sprint(i) {
			r.Fatalf("oci-walkthrough.md:%d: %s", all[max(0, i-1)].line, part)
		}
		if strings.Contains(printed, "@@ failed") || !all[i].pattern().MatchString(ended(printed)) {
			r.Errorf("oci-walkthrough.md:%d: %sprints\n%s\nwant\n%s", all[i].line, all[i].command, printed, strings.Join(all[i].prints, "\n"))
		}
	}
}

// ended is text with a newline at its end, if there is any.
func ended(text string) string {
	if text == "" || strings.HasSuffix(text, "\n") {
		return text
	}
	return text + "\n"
}
