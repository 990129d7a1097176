package netavark

import (
	"cmp"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/BurntSushi/toml"
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

// networkDirs are where Podman keeps its networks unless containers.conf says otherwise. Those of an ordinary user are
// beside the images.
func networkDirs() []string {
	if os.Geteuid() == 0 && !Rootless() {
		return []string{"/etc/containers/networks"}
	}
	return []string{filepath.Join(graphRoot(), "networks")}
}

// graphRoot is where an ordinary user's Podman keeps images (containers-storage.conf(5)).
func graphRoot() string {
	home := os.Getenv("HOME")
	file := cmp.Or(os.Getenv("CONTAINERS_STORAGE_CONF"),
		filepath.Join(cmp.Or(os.Getenv("XDG_CONFIG_HOME"), filepath.Join(home, ".config")), "containers/storage.conf"))
	var conf struct {
		Storage struct {
			GraphRoot string `toml:"graphroot"`
		} `toml:"storage"`
	}
	if _, err := toml.DecodeFile(file, &conf); err == nil && conf.Storage.GraphRoot != "" {
		return os.ExpandEnv(conf.Storage.GraphRoot)
	}
	return filepath.Join(cmp.Or(os.Getenv("XDG_DATA_HOME"), filepath.Join(home, ".local/share")), "containers/storage")
}

// Rootless tells whether Podman runs us in the user namespace that it makes for an ordinary user. There everybody is root.
func Rootless() bool { return os.Getenv("_CONTAINERS_USERNS_CONFIGURED") != "" }
