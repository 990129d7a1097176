// Package doc holds the papers to the code.
package doc

import (
	"os"
	"strings"
	"testing"

	"github.com/usernet/usernet/config"
)

// Every option of a network is in the table of the README and in the manual.
func TestOptions(t *testing.T) {
	readme, manual := read(t, "../README.md"), read(t, "man/usernet.8")
	for _, name := range config.Names() {
		if !tableHas(readme, name) {
			t.Errorf("README.md: option %s is not in the table", name)
		}
		if !strings.Contains(manual, ".It Cm "+name+" Ns = ") && !strings.Contains(manual, ", Cm "+name+" Ns = ") {
			t.Errorf("usernet.8: option %s is missing", name)
		}
	}
}

// tableHas tells whether a row's first cell has name in backquotes.
func tableHas(text, name string) bool {
	for line := range strings.Lines(text) {
		row, ok := strings.CutPrefix(line, "| ")
		cell, _, _ := strings.Cut(row, "|")
		if ok && strings.Contains(cell, "`"+name+"`") {
			return true
		}
	}
	return false
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
