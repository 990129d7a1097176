package doc

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver/ocihook"
)

// Every setting of a container and every option of its network is in the manual of the hook, as the annotation it is.
func TestAnnotations(t *testing.T) {
	manual := read(t, "man/usernet-oci-hook.8")
	items := map[string]bool{}
	for _, m := range regexp.MustCompile(`usernet\.[a-z0-9_]+`).FindAllString(manual, -1) {
		items[strings.TrimPrefix(m, "usernet.")] = true
	}
	delete(items, "json") // dist/hooks.d/usernet.json
	delete(items, "conf") // usernet.conf
	known := config.Names()
	for _, s := range ocihook.Settings {
		known = append(known, s.Name)
	}
	for _, name := range known {
		if !items[name] {
			t.Errorf("usernet-oci-hook.8: usernet.%s is missing", name)
		}
		delete(items, name)
	}
	for name := range items {
		t.Errorf("usernet-oci-hook.8: there is no usernet.%s", name)
	}
}

// The hook for Podman (oci-hooks(5)) is one that its annotation leads to.
func TestHooksDir(t *testing.T) {
	var hook struct {
		Version string
		Hook    struct {
			Path string
			Args []string
		}
		When   struct{ Annotations map[string]string }
		Stages []string
	}
	if err := json.Unmarshal([]byte(read(t, "../dist/hooks.d/usernet.json")), &hook); err != nil {
		t.Fatal(err)
	}
	for key := range hook.When.Annotations {
		if !regexp.MustCompile(key).MatchString("usernet.network") {
			t.Errorf("annotation %s", key)
		}
	}
	if hook.Version != "1.0.0" || len(hook.When.Annotations) != 1 || strings.Join(hook.Hook.Args, " ") != "usernet oci-hook" || strings.Join(hook.Stages, " ") != "createRuntime poststop" {
		t.Errorf("%+v", hook)
	}
}
