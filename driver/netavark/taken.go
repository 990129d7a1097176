package netavark

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
)

// takenSubnets are the subnets of Podman's networks but that with the ID. What cannot be read there is nothing that
// anybody could do about here: a subnet that overlaps is found out later.
func takenSubnets(except string) []netip.Prefix {
	var taken []netip.Prefix
	for _, dir := range networkDirs() {
		files, err := filepath.Glob(filepath.Join(dir, "*.json"))
		if err != nil {
			continue
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				continue
			}
			var n network
			if json.Unmarshal(text, &n) != nil || n.ID == except {
				continue
			}
			for _, s := range n.Subnets {
				if p := prefix(s.Subnet); p.IsValid() {
					taken = append(taken, p)
				}
			}
		}
	}
	return taken
}

// networkDirs are where Podman keeps its networks unless its configuration says otherwise.
func networkDirs() []string {
	if os.Geteuid() == 0 && !Rootless() {
		return []string{"/etc/containers/networks"}
	}
	data := os.Getenv("XDG_DATA_HOME")
	if data == "" {
		data = filepath.Join(os.Getenv("HOME"), ".local/share")
	}
	return []string{filepath.Join(data, "containers/storage/networks")}
}

// Rootless tells whether Podman runs us in the user namespace that it makes for an ordinary user. There everybody is root.
func Rootless() bool { return os.Getenv("_CONTAINERS_USERNS_CONFIGURED") != "" }
