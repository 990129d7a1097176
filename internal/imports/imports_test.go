// Package imports holds the project to the import tables of doc/design.md: it reads them there, so that the document
// and the rule are one.
package imports

import (
	"errors"
	"fmt"
	"go/build"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/usernet/usernet"
	top    = "../.."
	design = top + "/doc/design.md"
)

// forTests are the rooms that every test may use and nothing else.
const forTests = "internal/nettest/..."

// The headings of the tables in doc/design.md.
const (
	oursHeading   = "| package | may import |"
	othersHeading = "| module | imported by |"
)

func TestImports(t *testing.T) {
	text, err := os.ReadFile(design)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := table(string(text), oursHeading)
	if err != nil {
		t.Fatal(err)
	}
	others, err := table(string(text), othersHeading)
	if err != nil {
		t.Fatal(err)
	}
	packages, err := load(top)
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range check(ours, others, packages) {
		t.Error(fault)
	}
}

// pkg is one package of the project. Paths of packages are relative to the module; the root is ".".
type pkg struct {
	path    string
	imports []string // ours relative, others as written
	tests   []string // what only its tests import
}

// rules has the cells of a table: which packages the row is about, and what it says of them.
type rules []rule

type rule struct{ left, right []string }

// table finds a table of the document by its heading.
func table(text, heading string) (rules, error) {
	_, body, found := strings.Cut(text, heading+"\n")
	if !found {
		return nil, fmt.Errorf("%s: no table with the heading %q", design, heading)
	}
	var rs rules
	for i, line := range strings.Split(body, "\n") {
		if !strings.HasPrefix(line, "|") {
			break
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if len(cells) != 2 {
			return nil, fmt.Errorf("%s: row %q: want two cells", design, line)
		}
		if i == 0 { // |---|---|
			continue
		}
		r := rule{names(cells[0]), names(cells[1])}
		if len(r.left) == 0 {
			return nil, fmt.Errorf("%s: row %q: no package in it", design, line)
		}
		rs = append(rs, r)
	}
	if len(rs) == 0 {
		return nil, fmt.Errorf("%s: the table %q is empty", design, heading)
	}
	return rs, nil
}

var code = regexp.MustCompile("`([^`]+)`")

// names are what a cell has in backquotes, with the root as ".". Words outside of them are for the reader.
func names(cell string) []string {
	var ns []string
	for _, m := range code.FindAllStringSubmatch(cell, -1) {
		if m[1] == "usernet" {
			m[1] = "."
		}
		ns = append(ns, m[1])
	}
	return ns
}

// matches tells whether one of the patterns is for p: a name, a name with *, or a tree as in test/... .
func matches(patterns []string, p string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		if tree, ok := strings.CutSuffix(pattern, "..."); ok {
			return strings.HasPrefix(p+"/", tree)
		}
		ok, err := path.Match(pattern, p)
		return ok && err == nil
	})
}

// row is the rule for p. A row that gives its name goes before one with a pattern.
func (rs rules) row(p string) (rule, bool) {
	for _, exact := range []bool{true, false} {
		for _, r := range rs {
			if exact && slices.Contains(r.left, p) || !exact && matches(r.left, p) {
				return r, true
			}
		}
	}
	return rule{}, false
}

// check returns what is wrong: with the packages, and with rows that no package needs.
func check(ours, others rules, packages []pkg) []string {
	var faults []string
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for _, p := range packages {
		r, ok := ours.row(p.path)
		if !ok {
			fault("package %s is not in the import table of doc/design.md", p.path)
			continue
		}
		for _, i := range p.imports {
			if room, ok := inside(i); ok && !matches(r.right, room) {
				fault("package %s imports %s, which the table of doc/design.md does not allow", p.path, room)
			}
		}
		for _, i := range p.tests {
			if room, ok := inside(i); ok && room != p.path && !matches(append([]string{forTests}, r.right...), room) {
				fault("a test of package %s imports %s, which the table of doc/design.md does not allow", p.path, room)
			}
		}
		for _, i := range slices.Concat(p.imports, p.tests) {
			for _, o := range others {
				if partOf(i, o.left) && !matches(o.right, p.path) {
					fault("package %s imports %s, which is for %s only", p.path, i, strings.Join(o.right, ", "))
				}
			}
		}
	}
	for _, r := range ours {
		for _, pattern := range r.left {
			if !slices.ContainsFunc(packages, func(p pkg) bool { return matches([]string{pattern}, p.path) }) {
				fault("the import table of doc/design.md has %s, which is no package", pattern)
			}
		}
	}
	return faults
}

// inside returns a package of the project as the tables name it.
func inside(imported string) (string, bool) {
	if imported == module {
		return ".", true
	}
	return strings.CutPrefix(imported, module+"/")
}

// partOf tells whether a package is in one of the modules.
func partOf(imported string, modules []string) bool {
	return slices.ContainsFunc(modules, func(m string) bool { return strings.HasPrefix(imported+"/", m+"/") })
}

// load reads the imports of every package below dir, for every operating system that the project has files for.
func load(dir string) ([]pkg, error) {
	var packages []pkg
	err := filepath.WalkDir(dir, func(d string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		if name := e.Name(); d != dir && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata") {
			return filepath.SkipDir
		}
		p, err := read(d)
		if err != nil || p == nil {
			return err
		}
		if p.path, err = filepath.Rel(dir, d); err != nil {
			return err
		}
		packages = append(packages, *p)
		return nil
	})
	return packages, err
}

// read returns nil for a directory without Go files.
func read(dir string) (*pkg, error) {
	p := &pkg{}
	found := false
	for _, system := range []string{"linux", "darwin", "windows"} {
		ctx := build.Default
		ctx.GOOS = system
		b, err := ctx.ImportDir(dir, 0)
		if _, none := errors.AsType[*build.NoGoError](err); none {
			continue
		}
		if err != nil {
			return nil, err
		}
		found = true
		p.imports = append(p.imports, b.Imports...)
		p.tests = append(p.tests, slices.Concat(b.TestImports, b.XTestImports)...)
	}
	if !found {
		return nil, nil
	}
	for _, list := range []*[]string{&p.imports, &p.tests} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	return p, nil
}

// TestCheck shows that each kind of fault is found.
func TestCheck(t *testing.T) {
	text := strings.ReplaceAll(oursHeading+`
|---|---|
| the root, 'usernet' | nothing |
| 'low' | 'usernet', 'internal/*' |
| 'internal/*', 'door' | the root alone: 'usernet' |
| 'door/*' | 'usernet', 'door' |
| 'all' | everything: '...' |
| 'test/...' | '...' |

`+othersHeading+`
|---|---|
| 'example.org/x' | 'low' |
`, "'", "`")
	ours, err := table(text, oursHeading)
	if err != nil {
		t.Fatal(err)
	}
	others, err := table(text, othersHeading)
	if err != nil {
		t.Fatal(err)
	}
	our := func(names ...string) (imports []string) {
		for _, n := range names {
			imports = append(imports, path.Join(module, n))
		}
		return imports
	}
	good := []pkg{
		{path: ".", imports: []string{"fmt"}},
		{path: "low", imports: append(our(".", "internal/a"), "example.org/x/y"), tests: our("low", "internal/nettest")},
		{path: "internal/a"},
		{path: "door", imports: our(".")},
		{path: "door/one", imports: our(".", "door")},
		{path: "all", imports: our(".", "low", "door", "door/one")},
		{path: "test/deep/down", imports: our("all", "door/one", "internal/a", ".")},
	}
	if faults := check(ours, others, good); faults != nil {
		t.Errorf("faults where there are none: %q", faults)
	}
	for _, tt := range []struct {
		name, want string
		bad        pkg
	}{
		{"unknown package", "package high is not in the import table", pkg{path: "high"}},
		{"unknown depth", "package door/one/more is not", pkg{path: "door/one/more"}},
		{"the root imports", "package . imports low", pkg{path: ".", imports: our("low")}},
		{"upwards", "package low imports door", pkg{path: "low", imports: our("door")}},
		{"sideways", "package door/two imports door/one", pkg{path: "door/two", imports: our("door", "door/one")}},
		{"upwards in a test", "a test of package low imports door", pkg{path: "low", tests: our("door")}},
		{"nettest outside of tests", "package door imports internal/nettest", pkg{path: "door", imports: our("internal/nettest")}},
		{"another's module", "package door imports example.org/x, which is for low only", pkg{path: "door", imports: []string{"example.org/x"}}},
		{"another's module in a test", "package all imports example.org/x/z", pkg{path: "all", tests: []string{"example.org/x/z"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			faults := check(ours, others, append(slices.Clone(good), tt.bad))
			if len(faults) != 1 || !strings.Contains(faults[0], tt.want) {
				t.Errorf("faults %q, want one with %q", faults, tt.want)
			}
		})
	}
	if faults := check(ours, others, good[1:]); len(faults) != 1 || !strings.Contains(faults[0], "which is no package") {
		t.Errorf("faults %q, want one about the row of a package that is gone", faults)
	}
}
