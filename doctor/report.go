package doctor

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

const (
	width   = 80 // columns
	nameCol = 11 // where names begin, and commands
	textCol = 29 // and details
)

// labels are what a status is called on paper, and its colour (ECMA-48, SGR).
var labels = map[Status]struct{ text, colour string }{
	OK:      {"OK", "32"},
	Warning: {"warning", "33"},
	Missing: {"missing", "31"},
	Info:    {"info", "36"},
}

// Write prints findings for people, in groups and 80 columns, and says at the end what they come to.
func Write(w io.Writer, all []Finding, colour bool) error {
	var b strings.Builder
	group := ""
	for _, f := range all {
		if f.Group != group {
			if group != "" {
				b.WriteByte('\n')
			}
			group = f.Group
			fmt.Fprintln(&b, group)
		}
		l := labels[f.Status]
		fmt.Fprintf(&b, "  %s%*s%-*s", paint(l.text, l.colour, colour), nameCol-2-len(l.text), "", textCol-nameCol, f.Name)
		for i, line := range fold(f.Detail, width-textCol) {
			if i > 0 {
				fmt.Fprintf(&b, "%*s", textCol, "")
			}
			fmt.Fprintln(&b, line)
		}
		writeFix(&b, f.Fix)
	}
	b.WriteByte('\n')
	for _, line := range fold(verdict(all), width) {
		fmt.Fprintln(&b, line)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// writeFix prints a command so that it can be copied: it is broken only where the shell allows it.
func writeFix(b *strings.Builder, command string) {
	if command == "" {
		return
	}
	const prompt = "$ "
	room := width - nameCol - len(prompt)
	lines := []string{command}
	if utf8.RuneCountInString(command) > room {
		lines = fold(command, room-len(` \`))
	}
	for i, line := range lines {
		lead := prompt
		if i > 0 {
			lead = "  "
		}
		if i < len(lines)-1 {
			line += ` \`
		}
		fmt.Fprintf(b, "%*s%s%s\n", nameCol, "", lead, line)
	}
}

func paint(text, colour string, on bool) string {
	if !on {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// fold breaks text at spaces into lines of at most n characters; what has no space is not broken.
func fold(text string, n int) []string {
	var lines []string
	line := ""
	for word := range strings.FieldsSeq(text) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > n:
			lines = append(lines, line)
			line = word
		default:
			line += " " + word
		}
	}
	return append(lines, line)
}

// verdict is the last line.
func verdict(all []Finding) string {
	n := map[Status]int{}
	for _, f := range all {
		n[f.Status]++
	}
	text := "Usermode networks cannot work for you yet: see what is missing above."
	if Works(all) {
		text = "Usermode networks work for you."
	}
	if n[Warning] > 0 {
		text += fmt.Sprintf(" Worth a look: %s.", count(n[Warning], "warning"))
	}
	return text
}
